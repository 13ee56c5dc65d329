"""Adapters as kernels see them: how a layer's projections are grouped, and where adapters lie."""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from granatum.kernels.backend import require
from granatum.kernels.layout import Tiles

MAX_RANK = 256
MOST_PROJECTIONS = 3
"""The most projections of a group that the kernels take."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """The fused linears of a layer: `projections[g]` is how many projections group g fuses.

    Groups and projections are counted in this order, across the layer, in the adapter table and in
    every kernel.

    Raises:
        ValueError: a group of none or of more than `MOST_PROJECTIONS`.
    """

    projections: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the counts."""
        fits = all(1 <= n <= MOST_PROJECTIONS for n in self.projections)
        require(fits, f"groups have 1 to {MOST_PROJECTIONS} projections, not {self.projections}")

    @property
    def first(self) -> tuple[int, ...]:
        """The index of each group's first projection among the layer's projections."""
        return tuple(accumulate(self.projections[:-1], initial=0))

    @property
    def count(self) -> int:
        """Projections of a layer."""
        return sum(self.projections)


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """Where each slot's adapter lies in the arena; fixed addresses.

    The row of a slot that no launched step uses may be rewritten at any time.

    a:     int64 [slots, layers, groups], element offset of the group's stacked A, [R, K] row-major;
    b:     int64 [slots, layers, projections], element offset of the projection's B^T, [r, N];
    rank:  int32 [slots, layers, projections], multiple of 8; 0: the adapter skips the projection;
    scale: float32 [slots, layers, projections].

    Pieces start 128-byte aligned. R is the sum of the ranks of the group's projections, in order.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: torch.Tensor
    scale: torch.Tensor
    groups: GroupLayout
    max_rank: int = MAX_RANK
    """No rank in the table is ever larger; it sizes workspaces and chooses configurations."""

    @classmethod
    def allocate(
        cls,
        groups: GroupLayout,
        slots: int,
        layers: int,
        device: torch.device | str,
        max_rank: int = MAX_RANK,
    ) -> "AdapterTable":
        """A table in which every slot leaves every projection alone."""
        shape = (slots, layers, groups.count)
        return cls(
            a=torch.zeros(slots, layers, len(groups.projections), dtype=torch.int64, device=device),
            b=torch.zeros(shape, dtype=torch.int64, device=device),
            rank=torch.zeros(shape, dtype=torch.int32, device=device),
            scale=torch.zeros(shape, dtype=torch.float32, device=device),
            groups=groups,
            max_rank=max_rank,
        )

    def to(self, device: torch.device | str) -> "AdapterTable":
        """A copy on another device."""
        tensors = (self.a, self.b, self.rank, self.scale)
        a, b, rank, scale = (tensor.to(device) for tensor in tensors)
        return AdapterTable(a, b, rank, scale, self.groups, self.max_rank)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class GroupAdapters:
    """The adapters of one fused linear: all that a LoRA op must know but the rows.

    arena:        contiguous, at least 16-byte aligned; adapters have its dtype, and so has x;
    layer, group: which linear, as the table counts;
    in_features:  K, the width of x;
    out_features: N of each projection; y holds them side by side.

    Raises:
        ValueError: `out_features` that are not the group's.
    """

    arena: torch.Tensor
    table: AdapterTable
    layer: int
    group: int
    in_features: int
    out_features: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the number of projections."""
        fits = len(self.out_features) == self.table.groups.projections[self.group]
        require(fits, f"group {self.group} is not {self.out_features}")

    @property
    def constants(self) -> dict[str, int]:
        """What LoRA kernels are compiled with: where the group's projections stand in the table."""
        return _constants(self.table.groups, self.group)


@cache
def _constants(groups: GroupLayout, group: int) -> dict[str, int]:
    return {"PROJECTION": groups.first[group], "LAYER_PROJECTIONS": groups.count}


@dataclass(frozen=True, slots=True)
class LoraRows:
    """The rows that a LoRA op goes through, and room for their partial sums.

    workspace: float32, `lora.ops.workspace_elements` at least; both halves of an op share it.
    """

    tiles: Tiles
    workspace: torch.Tensor
