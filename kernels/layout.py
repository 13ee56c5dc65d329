"""How the arena and a step's work lists are laid out: what every kernel that reads them agrees on.

The arena is one contiguous tensor of the model's dtype; KV and adapters lie in it at element
offsets. A step has T rows; tiles say which of them go through which adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

GROUPS = ("qkv", "o", "gate_up", "down")
"""The fused linears of a layer, in the order of their indices."""
GROUP_PROJECTIONS = (3, 1, 2, 1)
"""Projections of each group."""
FIRST_PROJECTION = (0, 3, 4, 6)
"""Index of each group's first projection among a layer's seven."""
MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """Where each slot's adapter lies in the arena; fixed addresses, rewritten between steps.

    a:     int64 [slots, layers, 4], element offset of the group's stacked A, [R, K] row-major;
    b:     int64 [slots, layers, 7], element offset of the projection's B transposed, [r, N];
    rank:  int32 [slots, layers, 7], multiple of 8; 0: the adapter leaves the projection alone;
    scale: float32 [slots, layers, 7].

    Pieces start 128-byte aligned. R is the sum of the ranks of the group's projections, in order.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: torch.Tensor
    scale: torch.Tensor
    max_rank: int = MAX_RANK
    """No rank in the table is ever larger; it sizes workspaces and chooses configurations."""

    @classmethod
    def allocate(
        cls, slots: int, layers: int, device: torch.device | str, max_rank: int = MAX_RANK
    ) -> "AdapterTable":
        """A table whose slots all leave every projection alone."""
        projections = sum(GROUP_PROJECTIONS)
        groups = len(GROUP_PROJECTIONS)
        return cls(
            a=torch.zeros(slots, layers, groups, dtype=torch.int64, device=device),
            b=torch.zeros(slots, layers, projections, dtype=torch.int64, device=device),
            rank=torch.zeros(slots, layers, projections, dtype=torch.int32, device=device),
            scale=torch.zeros(slots, layers, projections, dtype=torch.float32, device=device),
            max_rank=max_rank,
        )

    def to(self, device: torch.device | str) -> "AdapterTable":
        """A copy on another device."""
        tensors = (self.a, self.b, self.rank, self.scale)
        a, b, rank, scale = (tensor.to(device) for tensor in tensors)
        return AdapterTable(a, b, rank, scale, self.max_rank)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's rows, cut into pieces of at most `block_m` that one block of a kernel takes.

    entries: int32 [capacity, 4], beyond `count` never read as tiles,
             for LoRA (adapter slot, first row, rows, 0), base-model rows in none or of slot -1;
             for prefill attention (row of the page table, first row, rows, position of that row);
    count:   int32 [1];
    order:   int32 [T] or None: LoRA's tiles count rows in this order, order[i] being the i-th, so
             that rows of one adapter need not be adjacent; None: as they are.
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
        """The most tiles there can be; it alone sizes grids."""
        return self.entries.shape[0]

    def fill(self, tiles: Sequence[tuple[int, ...]]) -> None:
        """Make `tiles`, as `make_tiles` or `make_query_tiles` lists them, the content."""
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

    `slots_per_row` holds each row's adapter slot; None or -1 is the base model, in no tile, or
    with `base` in tiles of slot -1.
    """
    tiles: list[tuple[int, int, int]] = []
    first = 0
    for slot, run in groupby(-1 if slot is None else slot for slot in slots_per_row):
        end = first + len(list(run))
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


def make_query_tiles(
    chunks: Sequence[tuple[int, int, int, int]], block_m: int
) -> list[tuple[int, int, int, int]]:
    """Chunks (page table row, first row of q, rows, first position) cut to `block_m` rows each."""
    return [
        (sequence, first + m, min(block_m, rows - m), position + m)
        for sequence, first, rows, position in chunks
        for m in range(0, rows, block_m)
    ]
