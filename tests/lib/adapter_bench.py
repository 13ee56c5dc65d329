"""A store of adapters, and a cache that brings them onto the CPU."""

import shutil
import time
from pathlib import Path

import torch
from small_adapters import BASE

from granatum.kernels.adapters import AdapterTable, GroupLayout
from granatum.models.families import LLAMA
from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.disk.disk import DiskImages
from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.model.adapter_loader import AdapterLoader, MemoryImages
from granatum.runner.pages import PagePool
from granatum.v1.errors import Unavailable

LAYOUT = GroupLayout(tuple(len(group.projections) for group in LLAMA.groups))
SHAPE = ImageShape(BASE, "float32", 4096)


class Store:
    """Directories of adapters, as the object store would bring them; counts and can be away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.away = False

    def fetch(self, digest: str, directory: Path) -> Path:
        if self.away:
            raise Unavailable("the object store does not answer: try again")
        self.fetched.append(digest)
        shutil.copytree(self.root / digest, directory / digest)
        return directory / digest


class Bench:
    """A cache with its loader on a small arena."""

    def __init__(self, disk: DiskImages | MemoryImages, pages: int = 12, host: int = 12) -> None:
        self.arena = torch.full((pages, SHAPE.page_elements), torch.nan)
        self.table = AdapterTable.allocate(LAYOUT, 3, BASE.num_layers, "cpu")
        self.loader = AdapterLoader(self.arena, self.table, disk, host * SHAPE.page_bytes)
        self.pool = PagePool(pages)
        self.cache = AdapterCache(self.pool, self.loader, slots=3)

    def bring(self, digest: str) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            slot = self.cache.acquire(digest)
            if slot is not None:
                return slot
            time.sleep(0.001)
            self.cache.poll()
        raise AssertionError(f"{digest} never came")

    def delta(self, slot: int, layer: int, name: str) -> torch.Tensor:
        """scale · B A `[outputs, inputs]`, read as a kernel reads it."""
        index = LLAMA.projections.index(name)
        group = next(i for i, g in enumerate(LLAMA.groups) if name in g.projections)
        first = index - LLAMA.groups[group].projections.index(name)
        inputs, outputs = BASE.features[name]
        rank = int(self.table.rank[slot, layer, index])
        row = int(self.table.rank[slot, layer, first:index].sum())
        flat = self.arena.view(-1)
        a_at = int(self.table.a[slot, layer, group]) + row * inputs
        b_at = int(self.table.b[slot, layer, index])
        a = flat[a_at : a_at + rank * inputs].view(rank, inputs)
        b = flat[b_at : b_at + rank * outputs].view(rank, outputs)
        return float(self.table.scale[slot, layer, index]) * (b.T @ a)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
