"""What a process holds of the device's, of pinned and of resident memory."""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

_MIB = 1 << 20
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: used on the device, pinned by torch, resident in this process."""

    device: int
    pinned: int
    resident: int

    @classmethod
    def now(cls, device: str) -> Self:
        """As it is now; nothing is pinned and no device used on a CPU."""
        resident = int(_STATM.read_text().split()[1]) * resource.getpagesize()
        if device != "cuda":
            return cls(0, 0, resident)
        free, total = torch.cuda.mem_get_info()
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        return cls(total - free, int(pinned), resident)

    @property
    def row(self) -> dict[str, float]:
        """In MiB."""
        return {
            "device_mib": round(self.device / _MIB, 1),
            "pinned_mib": round(self.pinned / _MIB, 1),
            "resident_mib": round(self.resident / _MIB, 1),
        }

    def since(self, first: Self) -> dict[str, float]:
        """What has been added, in MiB."""
        return {
            "device_grown_mib": round((self.device - first.device) / _MIB, 1),
            "pinned_grown_mib": round((self.pinned - first.pinned) / _MIB, 1),
            "resident_grown_mib": round((self.resident - first.resident) / _MIB, 1),
        }
