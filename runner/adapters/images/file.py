"""An adapter's image in one file on the local disk. No torch.

    header, padded to 4096 bytes | page 0 | page 1 | ...

The header holds the adapter's table row, a checksum of every page, and a checksum of itself. The
pages are the arena's own bytes, so bringing an adapter from disk takes one read and one checksum
per page. Every read finds flipped bits, a file that was cut off, and another adapter's content.
Others may write to the disk, so a table row whose checksum is right must still lead to no memory
beyond the adapter's pages.
"""

import os
import stat
import struct
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from granatum.adapters_store.limits import padded_rank
from granatum.models.base_model import BaseModel
from granatum.models.families import Family
from granatum.runner.adapters.images.image import AdapterImage, ImageShape, check_rank
from granatum.runner.adapters.images.layout import TableRow, padded

_ALIGNMENT = 4096
_FIXED = struct.Struct("<8s32s32sIIQQ")  # magic, digest, key, layers, pages, page bytes, checksum
_CHECKSUM_AT = _FIXED.size - 8
_MAGIC = b"GRANIMG\0"
_FIELDS: dict[str, type[np.generic]] = {
    "a_page": np.int32,
    "a_offset": np.int64,
    "b_page": np.int32,
    "b_offset": np.int64,
    "rank": np.int32,
    "scale": np.float32,
}
"""The table row's arrays, `[layers, width]` each, in the order of the header."""


class DamagedImage(Exception):
    """A file is no whole image of the adapter; the image can be made again."""


@dataclass(frozen=True, slots=True)
class _Header:
    """The content of a header that has been checked."""

    digest: str
    row: TableRow
    checksums: npt.NDArray[np.uint64]
    """One checksum for each page."""


def write_image(path: Path, digest: str, shape: ImageShape, image: AdapterImage) -> None:
    """Write the image file; it stands whole under its name, or not at all."""
    pages = image.pages.view(np.uint8)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_header(digest, shape, image.row, pages))
            file.write(pages.data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def image_pages(path: Path, shape: ImageShape) -> int:
    """Pages of the image, by its header. Raises as `read_image`."""
    with _open(path) as file:
        return len(_read_header(file, shape).checksums)


def read_image(path: Path, digest: str, shape: ImageShape, pages: Sequence[memoryview]) -> TableRow:
    """Read the file into page buffers, one for each page.

    Raises OSError, DamagedImage if the file is no whole image, and InvalidAdapter if the adapter's
    ranks are too high for this runner.
    """
    with _open(path) as file:
        header = _read_header(file, shape)
        if header.digest != digest or len(header.checksums) != len(pages):
            raise DamagedImage(f"{path} holds {len(header.checksums)} pages of {header.digest}")
        _read_pages(file, pages, header.checksums.tolist())
    return header.row


def _read_pages(file: BinaryIO, pages: Sequence[memoryview], checksums: Sequence[int]) -> None:
    """Fill the buffers. Another thread checks a page while the next one is read."""
    with ThreadPoolExecutor(1, thread_name_prefix="adapter-check") as checking:
        found = []
        for page in pages:
            if file.readinto(page) != len(page):  # type: ignore[attr-defined]
                raise DamagedImage(f"{file.name} ends early")
            found.append(checking.submit(xxhash.xxh3_64_intdigest, page))
        for number, (page_found, checksum) in enumerate(zip(found, checksums, strict=True)):
            if page_found.result() != checksum:
                raise DamagedImage(f"page {number} of {file.name} has changed")


def _open(path: Path) -> BinaryIO:
    """The file, unbuffered. Something else of that name, such as a pipe, is not waited for."""
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedImage(f"{path} is no file")
    _read_ahead(file)
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _read_ahead(file: BinaryIO) -> None:
    """Have the system read the whole file ahead, with many requests to the disk at a time."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a file system need not support it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _header(digest: str, shape: ImageShape, row: TableRow, pages: npt.NDArray[np.uint8]) -> bytes:
    arrays = [np.ascontiguousarray(getattr(row, name), _FIELDS[name]) for name in _FIELDS]
    checksums = np.array([xxhash.xxh3_64_intdigest(page.data) for page in pages], np.uint64)
    layers = row.rank.shape[0]
    fixed = _FIXED.pack(
        _MAGIC, bytes.fromhex(digest), shape.key, layers, len(pages), shape.page_bytes, 0
    )
    data = b"".join([fixed, *(array.tobytes() for array in arrays), checksums.tobytes()])
    header = bytearray(data.ljust(_header_bytes(shape.base, len(pages)), b"\0"))
    header[_CHECKSUM_AT : _FIXED.size] = _checksum(header).to_bytes(8, "little")
    return bytes(header)


def _header_bytes(base: BaseModel, pages: int) -> int:
    row = sum(np.dtype(_FIELDS[name]).itemsize * _width(name, base.family) for name in _FIELDS)
    return padded(_FIXED.size + base.num_layers * row + pages * 8, _ALIGNMENT)


def _width(field: str, family: Family) -> int:
    """Numbers of each layer: one per group for A, one per projection for the rest."""
    return len(family.groups if field.startswith("a_") else family.projections)


def _checksum(header: bytes | bytearray) -> int:
    """The checksum of a header without the checksum's own bytes."""
    checksum = xxhash.xxh3_64(header[:_CHECKSUM_AT])
    checksum.update(header[_FIXED.size :])
    return checksum.intdigest()


def _read_header(file: BinaryIO, shape: ImageShape) -> _Header:
    """Read and check the header. The file then stands at its first page."""
    layers = shape.base.num_layers
    fixed = file.read(_FIXED.size)
    if len(fixed) != _FIXED.size:
        raise DamagedImage(f"{file.name} ends within its header")
    magic, digest, key, found, pages, page_bytes, checksum = _FIXED.unpack(fixed)
    if (magic, key, found, page_bytes) != (_MAGIC, shape.key, layers, shape.page_bytes):
        raise DamagedImage(f"{file.name} was made for another model or another layout")
    size, expected = os.fstat(file.fileno()).st_size, _header_bytes(shape.base, pages)
    if size != expected + pages * page_bytes or not pages:
        raise DamagedImage(f"{file.name} has {size} bytes and should have {pages} pages")
    header = fixed + file.read(expected - len(fixed))
    if len(header) != expected or _checksum(header) != checksum:
        raise DamagedImage(f"{file.name} has a damaged header")
    row, end = _table_row(header, shape.base)
    _check_row(row, shape, pages, file.name)
    return _Header(digest.hex(), row, np.frombuffer(header, np.uint64, pages, end))


def _table_row(header: bytes, base: BaseModel) -> tuple[TableRow, int]:
    """The row, and where it ends."""
    at, arrays = _FIXED.size, dict[str, Any]()
    for field, dtype in _FIELDS.items():
        shape = base.num_layers, _width(field, base.family)
        array = np.frombuffer(header, dtype, shape[0] * shape[1], at).reshape(shape)
        arrays[field] = array
        at += array.nbytes
    return TableRow(**arrays), at


def _check_row(row: TableRow, shape: ImageShape, pages: int, name: str) -> None:
    """Refuse a row that would lead the kernels out of the adapter's pages."""
    fault = row.fault(shape.base, pages, shape.page_elements)
    if fault:
        raise DamagedImage(f"{name} would lead out of its pages: {fault}")
    limit = padded_rank(shape.max_rank)
    if row.rank.max() > limit:
        layer, index = np.argwhere(row.rank > limit)[0]
        module = shape.base.module_of(shape.base.family.projections[index])
        name = shape.base.module_name(int(layer), module.name)
        check_rank(int(row.rank[layer, index]), shape, name)
