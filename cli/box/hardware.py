"""The GPUs and cores of this machine, found without torch."""

import os
import subprocess
from itertools import takewhile

_TIMEOUT_S = 30.0


def devices() -> tuple[str, ...]:
    """One device per visible GPU, `cuda:0`, `cuda:1`, ...; none if there is no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA stops at the first entry that names no device.
        entries = (entry.strip() for entry in visible.split(","))
        count = len(list(takewhile(lambda entry: entry not in ("", "-1"), entries)))
    else:
        count = _installed_gpus()
    return tuple(f"cuda:{index}" for index in range(count))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _installed_gpus() -> int:
    """The number of GPUs that the driver lists; 0 without a driver, or if it does not answer."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
