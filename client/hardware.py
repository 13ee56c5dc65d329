"""What this machine has to run on, found without torch."""

import os
import shutil
import subprocess


def devices() -> tuple[str, ...]:
    """One device per visible GPU, `cuda:0`, `cuda:1`, ...; none if there is no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    else:
        count = _installed_gpus()
    return tuple(f"cuda:{index}" for index in range(count))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _installed_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
