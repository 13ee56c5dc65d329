"""The LoRA ops as a benchmark calls them: adapters given as matrices, timed launches given back.

`setup` is what a harness that compares implementations asks for: per set of weights (a model's
layer, say) a function that adds to y what the adapters of the batch's tokens make of x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from granatum.kernels.adapters import AdapterTable, GroupAdapters, GroupLayout, LoraRows
from granatum.kernels.layout import Tiles, make_tiles
from granatum.kernels.lora import ops as lora

Run = Callable[[torch.Tensor, torch.Tensor], None]
LAYOUT = GroupLayout((3, 1, 2, 1))
"""q, k, v; o; gate, up; down."""
GROUP_OF_SLICES = {3: 0, 1: 1, 2: 2}
"""A group with that many projections; o and down differ in their shape alone."""
_ALIGN = 64
"""Elements of 16 bits in 128 bytes."""


class Case(Protocol):
    """One batch through one fused linear."""

    @property
    def in_features(self) -> int:
        """Columns of x."""

    @property
    def out_slices(self) -> tuple[int, ...]:
        """Columns of y, by projection."""

    @property
    def rank(self) -> int:
        """Of every adapter."""

    @property
    def token_adapters(self) -> tuple[int, ...]:
        """Of each row of x."""

    @property
    def scale(self) -> float:
        """Of every adapter."""


class Weights(Protocol):
    """a[p] is [adapters, rank, in_features], b[p] is [adapters, out_slices[p], rank]."""

    @property
    def a(self) -> tuple[torch.Tensor, ...]:
        """Per projection."""

    @property
    def b(self) -> tuple[torch.Tensor, ...]:
        """Per projection."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Adapters of one group in an arena: offsets of the n-th adapter's pieces, and their ranks."""

    arena: torch.Tensor
    a: torch.Tensor
    """int64 [adapters]."""
    b: torch.Tensor
    """int64 [adapters, projections]."""
    ranks: tuple[int, ...]
    scale: float

    def table(self, group: int, slots: int, layers: int) -> AdapterTable:
        """Slot s of layer l is adapter `l * slots + s`."""
        first = LAYOUT.first[group]
        projections = slice(first, first + len(self.ranks))
        table = AdapterTable.allocate(LAYOUT, slots, layers, "cpu", max(self.ranks))
        index = torch.arange(layers)[None, :] * slots + torch.arange(slots)[:, None]
        table.a[:, :, group] = self.a[index]
        table.b[:, :, projections] = self.b[index]
        table.rank[:, :, projections] = torch.tensor(self.ranks, dtype=torch.int32)
        table.scale[:, :, projections] = self.scale
        return table.to(self.arena.device)


def pack(weight_sets: Sequence[Weights], scale: float) -> Packed:
    """All adapters of all sets, in order, as `docs/architecture.md` lays their pieces out."""
    ranks = tuple(-(-a.shape[1] // 8) * 8 for a in weight_sets[0].a)
    columns = []
    for weights in weight_sets:
        stacked = torch.cat([_pad_ranks(a) for a in weights.a], dim=1)
        turned = [_pad_ranks(b.transpose(1, 2)) for b in weights.b]
        columns.append(torch.cat([_piece(m) for m in (stacked, *turned)], dim=1))
    arena = torch.cat(columns)
    sizes = [_piece_elements(m) for m in (stacked, *turned)]
    first = torch.arange(arena.shape[0]) * arena.shape[1]
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    offsets = first[:, None] + starts[None, :]
    return Packed(arena, offsets[:, 0], offsets[:, 1:], ranks, scale)


def _pad_ranks(matrices: torch.Tensor) -> torch.Tensor:
    """[adapters, r, columns] with r rounded up to a multiple of 8 by zeros."""
    return torch.nn.functional.pad(matrices, (0, 0, 0, -matrices.shape[1] % 8))


def _piece_elements(matrices: torch.Tensor) -> int:
    return -(-matrices[0].numel() // _ALIGN) * _ALIGN


def _piece(matrices: torch.Tensor) -> torch.Tensor:
    """[adapters, elements], each padded to where the next piece may start."""
    flat = matrices.flatten(1)
    return torch.nn.functional.pad(flat, (0, _piece_elements(matrices) - flat.shape[1]))


def tile_batch(
    token_adapters: Sequence[int], block_m: int, device: torch.device, capacity: int | None = None
) -> Tiles:
    """Tiles of rows taken in the order of their adapters; room for a tile per row by default."""
    order = sorted(range(len(token_adapters)), key=token_adapters.__getitem__)
    found = make_tiles([token_adapters[t] for t in order], block_m)
    tiles = Tiles.allocate(capacity or len(order), block_m, device)
    tiles.fill(found)
    return replace(tiles, order=torch.tensor(order, dtype=torch.int32, device=device))


def setup(case: Case, weight_sets: Sequence[Weights]) -> list[Run]:
    """Runs of `add_lora`, one per weight set: layer l of one table holds the l-th set.

    Up to 128 rows are tiled as a decode step is, with room for a tile per row, more as prefill.
    """
    packed = pack(weight_sets, case.scale)
    group = GROUP_OF_SLICES[len(case.out_slices)]
    rows, device = len(case.token_adapters), packed.arena.device
    table = packed.table(group, weight_sets[0].a[0].shape[0], len(weight_sets))
    if rows <= 128:
        tiles = tile_batch(case.token_adapters, lora.DECODE_BLOCK_M, device)
    else:
        most = -(-rows // lora.PREFILL_BLOCK_M) + max(case.token_adapters) + 1
        tiles = tile_batch(case.token_adapters, lora.PREFILL_BLOCK_M, device, most)
    elements = lora.workspace_elements(
        rows, case.in_features, case.out_slices, tiles.block_m, table.max_rank, device
    )
    workspace = torch.empty(elements, dtype=torch.float32, device=device)
    widths = (case.in_features, case.out_slices)

    def bind(layer: int) -> Run:
        adapters = GroupAdapters(packed.arena, table, layer, group, *widths)
        call = (adapters, LoraRows(tiles, workspace))

        def run(x: torch.Tensor, y: torch.Tensor) -> None:
            lora.add_lora(y, x, *call)

        return run

    return [bind(layer) for layer in range(len(weight_sets))]
