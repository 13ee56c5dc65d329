"""Adapter images that others have harmed never reach the device."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_bench import LAYOUT, SHAPE, Bench, Store, cut_short
from small_adapters import BASE, digest_of, write_adapter

from granatum.kernels.adapters import AdapterTable
from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.disk.disk import DiskImages
from granatum.runner.adapters.images.image import ImageShape, random_image
from granatum.runner.model.adapter_loader import AdapterLoader, MemoryImages
from granatum.runner.pages import PagePool
from granatum.v1.errors import GranatumError, InvalidAdapter, InvalidRequest


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


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


def test_files_that_contradict_each_other_are_refused(bench: Bench, store: Store) -> None:
    write_adapter(store.root / digest_of(1), 1, 16, ["q_proj"])
    config = store.root / digest_of(1) / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    with pytest.raises(InvalidAdapter, match="cannot be packed"):
        bench.bring(digest_of(1))


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
