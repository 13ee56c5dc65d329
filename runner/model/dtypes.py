"""The dtypes of weights, KV and adapters: three settings, equal today."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The dtypes of weights, of KV, and of adapters in the arena.

    Raises:
        ValueError: KV and adapters differ, although one arena of one dtype holds both.
    """

    weights: torch.dtype
    kv: torch.dtype
    adapters: torch.dtype

    def __post_init__(self) -> None:
        """Check what the arena cannot hold."""
        if self.kv != self.adapters:
            raise ValueError(f"one arena cannot hold KV of {self.kv}, adapters of {self.adapters}")

    @classmethod
    def on(cls, device: torch.device) -> "Dtypes":
        """What an engine on `device` stores: bfloat16, or float32 on a CPU."""
        only = torch.float32 if device.type == "cpu" else torch.bfloat16
        return cls(weights=only, kv=only, adapters=only)
