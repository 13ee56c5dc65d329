"""Adapters from PEFT's files to the arena, through every tier, on the CPU."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_adapters import BASE, digest_of, write_adapter

from granatum.kernels.adapters import AdapterTable, GroupLayout
from granatum.models.base_model import GROUPS, PROJECTIONS
from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.disk.disk import DiskImages
from granatum.runner.adapters.images.image import ImageShape, build_image, random_image
from granatum.runner.engine.scheduling.pages import PagePool
from granatum.runner.model.adapter_loader import AdapterLoader, MemoryImages
from granatum.v1.errors import (
    GranatumError,
    Internal,
    InvalidAdapter,
    InvalidRequest,
    Unavailable,
)

LAYOUT = GroupLayout(tuple(len(names) for names in GROUPS.values()))
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
        index = PROJECTIONS.index(name)
        group = next(i for i, names in enumerate(GROUPS.values()) if name in names)
        first = index - list(GROUPS.values())[group].index(name)
        inputs, outputs = BASE.features[name]
        rank = int(self.table.rank[slot, layer, index])
        row = int(self.table.rank[slot, layer, first:index].sum())
        flat = self.arena.view(-1)
        a_at = int(self.table.a[slot, layer, group]) + row * inputs
        b_at = int(self.table.b[slot, layer, index])
        a = flat[a_at : a_at + rank * inputs].view(rank, inputs)
        b = flat[b_at : b_at + rank * outputs].view(rank, outputs)
        return float(self.table.scale[slot, layer, index]) * (b.T @ a)


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


ADAPTERS: list[tuple[int, list[str]]] = [
    (16, list(PROJECTIONS)),
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
        for name in PROJECTIONS:
            if name not in targets:
                assert bench.table.rank[slot, layer, PROJECTIONS.index(name)] == 0
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


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [damage_header, cut_short, remove])
def test_harmed_image_is_made_again(
    bench: Bench, disk: DiskImages, tmp_path: Path, store: Store, harm: Callable[[Path], None]
) -> None:
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    disk.measure(digest_of(1))
    (file,) = (tmp_path / "cache").rglob("*.image")
    harm(file)
    slot = bench.bring(digest_of(1))
    assert bench.delta(slot, 0, "q_proj").isfinite().all()
    assert len(store.fetched) == 2


def test_scan_removes_what_is_no_image_and_ignores_another_layout(
    tmp_path: Path, store: Store, disk: DiskImages
) -> None:
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    disk.measure(digest_of(1))
    (file,) = (tmp_path / "cache").rglob("*.image")
    cut_short(file)
    again = DiskImages(tmp_path / "cache", 1 << 30, SHAPE, store.fetch)
    assert again.size(digest_of(1)) is None
    assert not file.exists()
    other = ImageShape(BASE, "bfloat16", 4096)
    again.measure(digest_of(1))
    assert DiskImages(tmp_path / "cache", 1 << 30, other, store.fetch).size(digest_of(1)) is None
    assert file.exists()


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


def test_files_that_contradict_each_other_are_refused(bench: Bench, store: Store) -> None:
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    config = store.root / digest_of(1) / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    with pytest.raises(InvalidAdapter, match="cannot be packed"):
        bench.bring(digest_of(1))


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


def test_a_rank_above_the_runners_reaches_no_page(tmp_path: Path, store: Store) -> None:
    write_adapter(store.root / digest_of(1), 1, 24, ["q_proj"])
    write_adapter(store.root / digest_of(2), 2, 16, ["q_proj"])
    narrow = ImageShape(BASE, "float32", 4096, max_rank=16)
    bench = Bench(DiskImages(tmp_path / "cache", 1 << 30, narrow, store.fetch))
    with pytest.raises(InvalidAdapter, match=r"rank 24 .*limit of 16.*--max-rank") as refused:
        bench.bring(digest_of(1))
    assert refused.value.reason == "ADAPTER_RANK_TOO_HIGH"
    assert bench.bring(digest_of(2)) in range(3)
    bench.loader.close()


def damage_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 0x10
    path.write_bytes(data)


def take_anothers_content(path: Path) -> None:
    other = path.with_name(f"{digest_of(2)}.image")
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("harm", [damage_a_page, take_anothers_content])
def test_wrong_numbers_never_reach_the_device(
    bench: Bench, disk: DiskImages, store: Store, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    written = write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    write_adapter(store.root / digest_of(2), 2, 16, ["q_proj"])
    for number in (1, 2):
        disk.measure(digest_of(number))
    (file,) = (tmp_path / "cache").rglob(f"{digest_of(1)}.image")
    harm(file)
    slot = bench.bring(digest_of(1))
    prefix = f"base_model.model.{BASE.module_name(2, 'q_proj')}"
    b, a = written[f"{prefix}.lora_B.weight"], written[f"{prefix}.lora_A.weight"]
    assert torch.allclose(bench.delta(slot, 2, "q_proj"), 2 * b.float() @ a.float(), atol=1e-3)
    assert store.fetched.count(digest_of(1)) == 2


@pytest.mark.parametrize("fault", ["rank", "scale"])
def test_what_would_leave_the_kernels_memory_never_reaches_the_table(
    fault: str, tmp_path: Path
) -> None:
    """Whatever the image's maker let pass; those beside it are brought as always."""
    shape = ImageShape(BASE, "float32", 4096)
    bad, good = random_image(shape, 16, seed=1), random_image(shape, 8, seed=2)
    if fault == "scale":
        bad = random_image(shape, 8, seed=1)
        bad.row.scale[1, 2] = np.inf
    arena = torch.zeros(40, shape.page_elements)
    table = AdapterTable.allocate(LAYOUT, 3, BASE.num_layers, "cpu", max_rank=8)
    images = MemoryImages({digest_of(1): bad, digest_of(2): good})
    loader = AdapterLoader(arena, table, images, 40 * shape.page_bytes)
    cache = AdapterCache(PagePool(40), loader, slots=3)
    errors: list[GranatumError] = []
    deadline = time.monotonic() + 20
    slot = None
    while (slot is None or not errors) and time.monotonic() < deadline:
        cache.poll()
        slot = cache.acquire(digest_of(2))
        try:
            assert cache.acquire(digest_of(1)) is None
        except GranatumError as error:
            errors.append(error)
    assert slot is not None
    assert isinstance(errors[0], InvalidRequest)
    assert errors[0].reason == {"rank": "ADAPTER_RANK_TOO_HIGH", "scale": "ADAPTER_SCALE"}[fault]
    assert "--max-rank 16" in errors[0].message or fault == "scale"
    assert int(table.rank.max()) == 8
    assert table.scale.isfinite().all()
    assert int((table.rank.amax((1, 2)) > 0).sum()) == 1
    loader.close()
