"""Images' files: what a disk, or somebody who writes to it, can do to them is found at a read."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapters import BASE

from granatum.runner.adapters.images.file import DamagedImage, image_pages, read_image, write_image
from granatum.runner.adapters.images.image import AdapterImage, ImageShape, random_image
from granatum.runner.adapters.images.layout import TableRow
from granatum.v1.errors import InvalidAdapter

SHAPE = ImageShape(BASE, "float32", 1 << 13, max_rank=16)
DIGEST = "ab" * 32
IMAGE = random_image(SHAPE, rank=16, seed=1)


def buffers(count: int = len(IMAGE.pages)) -> list[memoryview]:
    return [memoryview(bytearray(SHAPE.page_bytes)) for _ in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / f"{DIGEST}.image"
    write_image(path, DIGEST, SHAPE, IMAGE)
    return path


def test_a_whole_file_gives_back_what_was_written(path: Path) -> None:
    pages = buffers()
    row = read_image(path, DIGEST, SHAPE, pages)
    assert image_pages(path, SHAPE) == len(pages) > 1
    assert b"".join(pages) == IMAGE.pages.tobytes()
    for field in fields(TableRow):
        assert np.array_equal(getattr(row, field.name), getattr(IMAGE.row, field.name))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.image"
    if not path.exists():
        write_image(path, DIGEST, SHAPE, IMAGE)
    size = path.stat().st_size
    header = size - IMAGE.pages.nbytes
    at = data.draw(st.integers(0, size - 1) | st.integers(0, header - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    flip(path, at, bit)
    try:
        with pytest.raises(DamagedImage):
            read_image(path, DIGEST, SHAPE, buffers())
    finally:
        flip(path, at, bit)
    read_image(path, DIGEST, SHAPE, buffers())


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def swap_pages(path: Path) -> None:
    data = path.read_bytes()
    size = SHAPE.page_bytes
    path.write_bytes(data[: -2 * size] + data[-size:] + data[-2 * size : -size])


def cut_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -SHAPE.page_bytes])


def cut_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(SHAPE.page_bytes))


def take_another_adapters(path: Path) -> None:
    write_image(path, "cd" * 32, SHAPE, random_image(SHAPE, rank=16, seed=2))


def take_another_layouts(path: Path) -> None:
    other = replace(SHAPE, page_elements=1 << 14)
    write_image(path, DIGEST, other, random_image(other, rank=16, seed=1))


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "harm",
    [
        *(swap_pages, cut_a_page, cut_the_header, empty, lengthen),
        *(take_another_adapters, take_another_layouts, make_a_directory, make_a_pipe),
    ],
)
def test_what_is_no_whole_image_of_the_digest_is_damaged(
    path: Path, harm: Callable[[Path], None]
) -> None:
    harm(path)
    with pytest.raises((DamagedImage, IsADirectoryError)):
        read_image(path, DIGEST, SHAPE, buffers())


def forged(path: Path, **changes: object) -> None:
    """A file with right checksums around a changed table row."""
    arrays = {field.name: getattr(IMAGE.row, field.name).copy() for field in fields(TableRow)}
    for name, value in changes.items():
        arrays[name][-1, -1] = value
    write_image(path, DIGEST, SHAPE, AdapterImage(IMAGE.pages, TableRow(**arrays)))


@pytest.mark.parametrize(
    "changes",
    [
        {"a_page": len(IMAGE.pages)},
        {"b_page": 1 << 30},
        {"b_page": -1},
        {"a_offset": SHAPE.page_elements},
        {"a_offset": -64},
        {"b_offset": 1 << 62},
        {"b_offset": 7},
        {"rank": 1 << 20},
        {"rank": -8},
        {"rank": 13},
        {"scale": float("nan")},
        {"scale": float("inf")},
    ],
)
def test_row_that_would_lead_out_of_the_pages_is_not_taken(
    path: Path, changes: dict[str, object]
) -> None:
    forged(path, **changes)
    with pytest.raises(DamagedImage):
        read_image(path, DIGEST, SHAPE, buffers())


def test_rank_of_a_larger_runner_is_refused_and_no_damage(path: Path) -> None:
    smaller = replace(SHAPE, max_rank=8)
    assert smaller.key == SHAPE.key, "runners that differ in this alone share images"
    with pytest.raises(InvalidAdapter, match=r"rank 16 .*--max-rank") as refused:
        read_image(path, DIGEST, smaller, buffers())
    assert refused.value.reason == "ADAPTER_RANK_TOO_HIGH"
