"""Adapters from PEFT's files to the arena, through every tier, on the CPU."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_bench import SHAPE, Bench, Store, cut_short
from small_adapters import BASE, digest_of, write_adapter

from granatum.models.families import LLAMA
from granatum.runner.adapters.disk.disk import DiskImages
from granatum.runner.adapters.images.image import build_image, random_image
from granatum.runner.model.adapter_loader import MemoryImages
from granatum.v1.errors import GranatumError, Internal, Unavailable

ADAPTERS: list[tuple[int, list[str]]] = [
    (16, list(LLAMA.projections)),
    (5, ["q_proj", "v_proj", "down_proj"]),
    (9, ["v_proj", "up_proj"]),
]


@pytest.mark.parametrize(("rank", "targets"), ADAPTERS)
def test_arena_and_table_give_what_peft_would(
    bench: Bench, store: Store, rank: int, targets: list[str]
) -> None:
    tensors = write_adapter(store.root / digest_of(1), 1, rank, targets)
    slot = bench.bring(digest_of(1))
    for layer in range(BASE.num_layers):
        for name in LLAMA.projections:
            if name not in targets:
                assert bench.table.rank[slot, layer, LLAMA.projections.index(name)] == 0
                continue
            prefix = f"base_model.model.{BASE.module_name(layer, name)}"
            a = tensors[f"{prefix}.lora_A.weight"].double()
            b = tensors[f"{prefix}.lora_B.weight"].double()
            expected = 2 * b @ a
            assert torch.allclose(bench.delta(slot, layer, name).double(), expected, atol=1e-3)


def test_adapters_come_and_go_without_disturbing_each_other(bench: Bench, store: Store) -> None:
    written = {}
    for number, (rank, targets) in enumerate(ADAPTERS * 3):
        written[number] = write_adapter(store.root / digest_of(number), number, rank, targets)
    order = np.random.default_rng(0).permutation(list(written) * 4)
    for number in order:
        slot = bench.bring(digest_of(number))
        name = ADAPTERS[number % 3][1][0]
        prefix = f"base_model.model.{BASE.module_name(2, name)}"
        expected = (
            2
            * written[number][f"{prefix}.lora_B.weight"].float()
            @ written[number][f"{prefix}.lora_A.weight"].float()
        )
        assert torch.allclose(bench.delta(slot, 2, name), expected, atol=1e-3)
        bench.cache.release(digest_of(number))
    assert sorted(set(store.fetched)) == sorted(store.fetched), "packed once, then from disk"


def test_image_survives_the_process_and_the_store(
    tmp_path: Path, store: Store, disk: DiskImages
) -> None:
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    pages = disk.measure(digest_of(1))
    store.away = True
    again = DiskImages(tmp_path / "cache", 1 << 30, SHAPE, store.fetch)
    assert again.size(digest_of(1)) == pages
    bench = Bench(again)
    assert bench.bring(digest_of(1)) in range(3)
    bench.loader.close()


def test_disk_keeps_to_its_limit_and_the_latest_used(tmp_path: Path, store: Store) -> None:
    for number in range(4):
        write_adapter(store.root / digest_of(number), number, 16, ["q_proj"])
    pages = build_image(store.root / digest_of(0), SHAPE).pages.shape[0]
    limit = 3 * pages * SHAPE.page_bytes
    disk = DiskImages(tmp_path / "cache", limit, SHAPE, store.fetch)
    buffers = [memoryview(bytearray(SHAPE.page_bytes)) for _ in range(pages)]
    for number in (0, 1, 2, 0, 3):
        disk.measure(digest_of(number))
        disk.read(digest_of(number), buffers)
    kept = {path.stem for path in (tmp_path / "cache").rglob("*.image")}
    assert kept == {digest_of(number) for number in (0, 2, 3)}
    assert not list((tmp_path / "cache").rglob(".*")), "nothing temporary remains"


def test_store_that_is_away_is_an_error_and_leaves_nothing(bench: Bench, store: Store) -> None:
    store.away = True
    with pytest.raises(Unavailable):
        bench.bring(digest_of(1))
    assert bench.pool.free_pages == bench.pool.total


def test_unforeseen_failure_does_not_wedge(bench: Bench, disk: DiskImages, store: Store) -> None:
    with pytest.raises(Internal):
        bench.bring(digest_of(7))
    with pytest.raises(GranatumError):
        bench.bring(digest_of(7))
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    assert bench.bring(digest_of(1)) in range(3)


def test_images_from_memory() -> None:
    images = {digest_of(n): random_image(SHAPE, rank=8, seed=n) for n in range(2)}
    bench = Bench(MemoryImages(images))
    slots = [bench.bring(digest) for digest in images]
    bench.cache.poll()
    assert sorted(bench.cache.figures.resident) == sorted(images)
    deltas = [bench.delta(slot, 1, "down_proj") for slot in slots]
    assert not torch.equal(*deltas)
    bench.loader.close()


class Gate:
    """Lets fetches of some digests hang until the test ends."""

    def __init__(self, store: Store, hung: set[str]) -> None:
        self.store, self.hung = store, hung
        self.open = threading.Event()
        self.waiting: list[str] = []

    def fetch(self, digest: str, directory: Path) -> Path:
        if digest in self.hung:
            self.waiting.append(digest)
            assert self.open.wait(20)
            raise Unavailable("the object store hangs: try again")
        return self.store.fetch(digest, directory)


def test_loads_that_hang_keep_no_other_adapter_waiting(tmp_path: Path, store: Store) -> None:
    hung = {digest_of(100 + number) for number in range(40)}
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    gate = Gate(store, hung)
    bench = Bench(DiskImages(tmp_path / "cache", 1 << 30, SHAPE, gate.fetch))
    try:
        for digest in hung:
            assert bench.cache.acquire(digest) is None
        assert bench.bring(digest_of(1)) in range(3)
        assert len(gate.waiting) == len(hung)
    finally:
        gate.open.set()
        bench.loader.close()


def test_images_that_are_made_again_keep_no_reads_waiting(tmp_path: Path, store: Store) -> None:
    damaged = {digest_of(number) for number in range(1, 7)}
    for digest in (*damaged, digest_of(9)):
        write_adapter(store.root / digest, 1, 8, ["v_proj"])
    first = DiskImages(tmp_path / "cache", 1 << 30, SHAPE, store.fetch)
    for digest in (*damaged, digest_of(9)):
        first.measure(digest)
    gate = Gate(store, damaged)
    bench = Bench(DiskImages(tmp_path / "cache", 1 << 30, SHAPE, gate.fetch))
    for file in (tmp_path / "cache").rglob("*.image"):
        if file.stem in damaged:
            cut_short(file)
    try:
        for digest in damaged:
            assert bench.cache.acquire(digest) is None
        assert bench.bring(digest_of(9)) in range(3)
    finally:
        gate.open.set()
        bench.loader.close()


def test_what_went_wrong_inside_is_for_the_log_alone(bench: Bench) -> None:
    with pytest.raises(Internal) as failed:
        bench.bring(digest_of(7))
    assert digest_of(7) not in failed.value.message
    assert "directory" not in failed.value.message
