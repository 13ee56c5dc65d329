"""Adapters from a store to the arena, through every tier."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_bench import SHAPE, Bench, Store

from granatum.runner.adapters.disk.disk import DiskImages


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def disk(tmp_path: Path, store: Store) -> DiskImages:
    return DiskImages(tmp_path / "cache", 1 << 30, SHAPE, store.fetch)


@pytest.fixture
def bench(disk: DiskImages) -> Iterator[Bench]:
    bench = Bench(disk)
    yield bench
    bench.loader.close()
