"""What GPU this is: the only file that knows a GPU's name or size."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """What kernels and their tables need to know of a GPU.

    name:          as the driver spells it, such as `NVIDIA H200`;
    sms:           streaming multiprocessors;
    shared_memory: bytes that one block may have at most;
    capability:    compute capability, major and minor.
    """

    name: str
    sms: int
    shared_memory: int
    capability: tuple[int, int]

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start while its predecessor ends (programmatic dependent launch)."""
        return self.capability >= (9, 0)


NO_GPU = Gpu("no GPU", sms=132, shared_memory=232448, capability=(0, 0))
"""The GPU that the interpreter and the twins pretend to have: an H200's size, without overlap."""


@cache
def gpu(index: int) -> Gpu:
    """The GPU of this index, as CUDA counts."""
    seen: Any = torch.cuda.get_device_properties(index)  # its stub lacks the shared memory
    capability = (seen.major, seen.minor)
    return Gpu(
        seen.name, seen.multi_processor_count, seen.shared_memory_per_block_optin, capability
    )


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a tensor of `device` lies on; `NO_GPU` for a CPU."""
    if device.type != "cuda":
        return NO_GPU
    return gpu(torch.cuda.current_device() if device.index is None else device.index)
