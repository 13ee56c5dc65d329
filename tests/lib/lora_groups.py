"""Adapters of one fused linear in an arena, and what they shall make of it, in float64."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from granatum.kernels.adapters import AdapterTable, GroupAdapters, GroupLayout, LoraRows
from granatum.kernels.backend import INTERPRETING
from granatum.kernels.layout import Tiles, make_tiles
from granatum.kernels.lora import ops as lora

LAYER, LAYERS = 1, 3
BFLOAT16 = 8e-3 if INTERPRETING else 4e-3  # the interpreter cuts off what rounding would keep
TOLERANCE = {torch.bfloat16: BFLOAT16, torch.float16: 6e-4, torch.float32: 2e-5}
LAYOUT = GroupLayout((3, 1, 2, 1))
QKV, OUT, GATE_UP, DOWN = range(4)

HOSTILE_SLOTS = [None, None, 1, 1, 1, 0, 0, None, 2]
"""The adapters' slots of rows, of which some are broken; of slot 1, rows of either kind."""
HOSTILE_ROWS, INNOCENT_ROWS = [1, 3, 5, 6, 8], [0, 2, 4, 7]


@dataclass
class Adapter:
    """Per projection of the group: A [r, K], B [N, r], scale; a rank of 0 is no projection."""

    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scale: list[float]


def make_adapter(ranks: Sequence[int], k: int, outs: Sequence[int], dtype: torch.dtype) -> Adapter:
    def matrix(rows: int, columns: int, size: float) -> torch.Tensor:
        return (torch.randn(rows, columns, dtype=torch.float64) * size).to(dtype)

    return Adapter(
        [matrix(r, k, k**-0.5) for r in ranks],
        [matrix(n, r, max(r, 1) ** -0.5) for n, r in zip(outs, ranks, strict=True)],
        [random.uniform(0.5, 2.0) for _ in ranks],
    )


@dataclass
class Group:
    """Adapters of one group in an arena whose unused elements are NaN, one adapter per slot."""

    group: int
    k: int
    outs: tuple[int, ...]
    adapters: list[Adapter]
    arena: torch.Tensor
    table: AdapterTable

    @classmethod
    def pack(
        cls,
        group: int,
        k: int,
        outs: tuple[int, ...],
        adapters: list[Adapter],
        dtype: torch.dtype,
        device: torch.device,
        max_rank: int,
    ) -> "Group":
        table = AdapterTable.allocate(LAYOUT, len(adapters), LAYERS, "cpu", max_rank)
        align = 128 // dtype.itemsize
        pieces: list[torch.Tensor] = []

        def put(piece: torch.Tensor) -> int:
            offset = sum(p.numel() for p in pieces)
            filler = torch.full((-piece.numel() % align + align,), torch.nan, dtype=dtype)
            pieces.extend([piece.reshape(-1), filler])
            return offset

        put(torch.full((align,), torch.nan, dtype=dtype))
        first = LAYOUT.first[group]
        table.rank[:, 0] = 256  # another layer's, whose pieces are not there
        for slot, adapter in enumerate(adapters):
            padded = [pad8(a) for a in adapter.a]
            table.a[slot, LAYER, group] = put(torch.cat(padded))
            for p, b in enumerate(adapter.b):
                table.b[slot, LAYER, first + p] = put(pad8(b.T))
                table.rank[slot, LAYER, first + p] = padded[p].shape[0]
                table.scale[slot, LAYER, first + p] = adapter.scale[p]
        arena = torch.cat(pieces).to(device)
        return cls(group, k, outs, adapters, arena, table.to(device))

    def truth(self, y: torch.Tensor, x: torch.Tensor, slots: Sequence[int | None]) -> torch.Tensor:
        """What add_lora shall make of y, in float64."""
        expected = y.double().cpu().clone()
        for t, slot in enumerate(slots):
            if slot is not None and slot >= 0:
                mine = self.adapters[slot]
                delta = [
                    s * (b.double() @ (a.double() @ x[t].double().cpu()))
                    for a, b, s in zip(mine.a, mine.b, mine.scale, strict=True)
                ]
                expected[t] += torch.cat(delta)
        return expected

    @property
    def packed(self) -> GroupAdapters:
        """The adapters as ops take them."""
        return GroupAdapters(self.arena, self.table, LAYER, self.group, self.k, self.outs)

    def rows(self, tiles: Tiles, rows: int) -> LoraRows:
        """Room for the partial sums of `rows` rows, full of NaN."""
        elements = lora.workspace_elements(
            rows, self.k, self.outs, tiles.block_m, self.table.max_rank, self.arena.device
        )
        return LoraRows(tiles, torch.full((elements,), torch.nan, device=self.arena.device))

    def add(self, y: torch.Tensor, x: torch.Tensor, tiles: Tiles) -> None:
        lora.add_lora(y, x, self.packed, self.rows(tiles, x.shape[0]))


def widths(block_m: int, *outs: int) -> tuple[int, ...]:
    """Output features as wide as kernels for tiles of so many rows want them, at least `outs`."""
    return tuple(-(-n // 128) * 128 for n in outs) if block_m == lora.PREFILL_BLOCK_M else outs


def pad8(matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % 8)).contiguous()


def tiles_of(
    slots: Sequence[int | None], block_m: int, device: torch.device, *, base: bool = False
) -> Tiles:
    found = make_tiles(slots, block_m, base=base)
    tiles = Tiles.allocate(len(found) + 3, block_m, device)
    tiles.entries.fill_(1 << 30)  # spare entries must not be followed
    tiles.entries[:, 3] = 0
    tiles.fill(found)
    return tiles


def activations(group: Group, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, group.k).to(group.arena)
    y = torch.randn(rows, sum(group.outs)).to(group.arena)
    return x, y


def break_rows(group: Group, x: torch.Tensor, y: torch.Tensor) -> None:
    """Make the hostile rows, and the adapters that none but them use, what must stay there."""
    _break_slot(group, 0, torch.nan)
    _break_slot(group, 2, 1e30)
    for rows, value in ((HOSTILE_ROWS[::2], torch.nan), (HOSTILE_ROWS[1::2], 1e30)):
        x[rows], y[rows] = value, value


def _break_slot(group: Group, slot: int, value: float) -> None:
    for p, (a, b) in enumerate(zip(group.adapters[slot].a, group.adapters[slot].b, strict=True)):
        first = LAYOUT.first[group.group] + p
        rank = int(group.table.rank[slot, LAYER, first])
        b_at = int(group.table.b[slot, LAYER, first])
        group.arena[b_at : b_at + rank * b.shape[0]] = value
        a_at = int(group.table.a[slot, LAYER, group.group])
        group.arena[a_at : a_at + rank * a.shape[1]] = value


def make_group(
    group: int,
    k: int,
    outs: tuple[int, ...],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Group:
    random.seed(0)
    adapters = [make_adapter(r, k, outs, dtype) for r in ranks]
    max_rank = max(8, *(-(-r // 8) * 8 for rank in ranks for r in rank))
    return Group.pack(group, k, outs, adapters, dtype, device, max_rank)
