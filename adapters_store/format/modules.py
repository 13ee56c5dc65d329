"""Which modules an adapter adapts, and what PEFT's two files call them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from granatum.models.base_model import BaseModel

CONFIG_FILE = "adapter_config.json"


def tensor_name(module: str, matrix: Literal["A", "B"]) -> str:
    """What PEFT's save_pretrained calls a module's `lora_A` or `lora_B`."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """How one module of one layer is adapted: y += scale · B (A x).

    A is `[rank, in_features]`, B `[out_features, rank]`.
    """

    rank: int
    scale: float


Modules = Mapping[tuple[int, str], ModuleSpec]
"""By (layer, module's name)."""


def by_projection(modules: Modules, base: BaseModel) -> dict[tuple[int, str], ModuleSpec]:
    """The same by (layer, projection): the parts of a fused module share its rank and scale."""
    return {
        (layer, projection): spec
        for (layer, module), spec in modules.items()
        for projection in base.modules[module].projections
    }
