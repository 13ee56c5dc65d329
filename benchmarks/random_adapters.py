"""Adapters of random numbers, all on the device from the start: nothing is ever loaded."""

import torch

from granatum.kernels.adapters import AdapterTable
from granatum.models.config import ModelConfig
from granatum.runner.adapters.residency import AdapterFigures
from granatum.runner.model.arena import Arena
from granatum.runner.pages import PagePool


class RandomAdapters:
    """`count` adapters of one rank on every projection; adapter i's digest is str(i)."""

    def __init__(
        self, config: ModelConfig, arena: Arena, table: AdapterTable, pool: PagePool, count: int
    ) -> None:
        self._config, self._arena, self._table, self._pool = config, arena, table, pool
        self._pages = 0
        for slot in range(count):
            self._place(slot, table.max_rank)
        self.figures = AdapterFigures(tuple(str(slot) for slot in range(count)), count, 0)

    def acquire(self, digest: str) -> int:
        """The slot."""
        return int(digest)

    def await_copy(self) -> None:
        """Nothing is on its way."""

    def release(self, digest: str) -> None:
        """Nothing: adapters stay."""

    def pages_of(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """Pages of each adapter."""
        return self._pages

    def poll(self) -> None:
        """Nothing is on its way."""

    def reclaim(self, pages: int) -> int:  # noqa: ARG002 - the protocol's signature
        """Nothing is given back."""
        return 0

    def _place(self, slot: int, rank: int) -> None:
        """Lay an adapter's pieces one after another into pages of random numbers."""
        pieces: list[tuple[torch.Tensor, int]] = []
        for layer in range(self._config.layers):
            for group, name in enumerate(self._config.in_features):
                projections = self._table.groups.projections[group]
                a = self._table.a[slot, layer, group]
                pieces.append((a, rank * projections * self._config.in_features[name]))
                for p, out in enumerate(self._config.out_features[name]):
                    b = self._table.b[slot, layer, self._table.groups.first[group] + p]
                    pieces.append((b, rank * out))
        size = self._arena.kv.page_elements
        page = at = size
        self._pages = 0
        for offset, elements in pieces:
            if at + elements > size:
                page, at = self._new_page(), 0
            offset.fill_(page * size + at)
            at += -(-elements // 64) * 64
        self._table.rank[slot] = rank
        self._table.scale[slot] = 2.0

    def _new_page(self) -> int:
        pages = self._pool.allocate(1)
        assert pages is not None, "the arena is too small for the adapters"
        self._arena.pages[pages[0]].normal_(0, 0.02)
        self._pages += 1
        return pages[0]
