"""How KV lies in the arena, and how a step's rows are listed: every kernel agrees on this.

The arena is one contiguous tensor; KV and adapters lie in it at element offsets. A step has T rows.
Tiles cut the rows into pieces, each for one block of a kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from granatum.kernels.backend import require


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's rows, cut into tiles of at most `block_m` rows; one block of a kernel takes a tile.

    entries: int32 [capacity, 4]; entries from `count` on are never read as tiles.
             A LoRA tile is (adapter slot, first row, rows, 0). Rows of the base model are in no
             tile, or in tiles of slot -1.
             An attention tile is (row of the page table, first row, rows, position of the first
             row);
    count:   int32 [1], tiles in use;
    order:   int32 [T] or None. LoRA tiles count rows in this order: order[i] is the i-th row. So
             the rows of one adapter need not be adjacent. None: rows are counted as they lie.
    """

    entries: torch.Tensor
    count: torch.Tensor
    block_m: int
    order: torch.Tensor | None = None

    @classmethod
    def allocate(cls, capacity: int, block_m: int, device: torch.device | str) -> "Tiles":
        """An empty list with room for `capacity` tiles."""
        entries = torch.zeros(capacity, 4, dtype=torch.int32, device=device)
        return cls(entries, torch.zeros(1, dtype=torch.int32, device=device), block_m)

    @property
    def capacity(self) -> int:
        """The most tiles there can be. Only this number sizes grids."""
        return self.entries.shape[0]

    def fill(self, tiles: Sequence[tuple[int, ...]]) -> None:
        """Replace the content by `tiles`, which `make_tiles` or `make_query_tiles` has listed."""
        if len(tiles) > self.capacity:
            raise ValueError(f"{len(tiles)} tiles do not fit a list of {self.capacity}")
        if tiles:
            rows = torch.tensor(tiles, dtype=torch.int32)
            self.entries[: len(tiles), : rows.shape[1]].copy_(rows)
        self.count.fill_(len(tiles))


def make_tiles(
    slots_per_row: Sequence[int | None], block_m: int, *, base: bool = False
) -> list[tuple[int, int, int]]:
    """Tiles (slot, first row, rows) of at most `block_m` adjacent rows of one adapter each.

    `slots_per_row` holds each row's adapter slot. None or -1 is the base model: such rows are in
    no tile, or in tiles of slot -1 if `base` is set.
    """
    tiles: list[tuple[int, int, int]] = []
    first = 0
    for slot, segment in groupby(-1 if slot is None else slot for slot in slots_per_row):
        end = first + len(list(segment))
        if slot >= 0 or base:
            tiles += [(slot, m, min(block_m, end - m)) for m in range(first, end, block_m)]
        first = end
    return tiles


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A page holds `page_tokens` tokens of all layers: [layer][k, v][kv_head][token][head_dim]."""

    page_elements: int
    page_tokens: int
    kv_heads: int
    head_dim: int

    @property
    def layer_elements(self) -> int:
        """Elements from a page's layer to its next."""
        return 2 * self.kv_heads * self.page_tokens * self.head_dim


@dataclass(frozen=True, slots=True)
class LayerKv:
    """The keys and values of one layer in the arena."""

    arena: torch.Tensor
    layout: KvLayout
    layer: int


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where a step's rows stand in their sequences and in the arena.

    positions: int [T], the row's position in its sequence;
    kv_slots:  int [T], page * page_tokens + place in the page; negative: the row has no place.
    """

    positions: torch.Tensor
    kv_slots: torch.Tensor

    def require(self, rows: int) -> None:
        """Refuse places that are not of `rows` rows.

        Raises:
            ValueError: naming the shape.
        """
        fits = self.positions.shape == self.kv_slots.shape == (rows,)
        require(fits, f"positions and kv_slots must be [{rows}]")


def make_query_tiles(
    chunks: Sequence[tuple[int, int, int, int]], block_m: int
) -> list[tuple[int, int, int, int]]:
    """Chunks (page table row, first row of q, rows, first position) cut to `block_m` rows each."""
    return [
        (sequence, first + m, min(block_m, rows - m), position + m)
        for sequence, first, rows, position in chunks
        for m in range(0, rows, block_m)
    ]
