"""An adapter's image in one file on the local disk. No torch.

    header, padded to 4096 bytes | page 0 | page 1 | ...

The header holds what the table row needs and a checksum of every page; it has one of its own. The
pages are the arena's own bytes, so that bringing an adapter from disk is one read and one checksum
per page. Flipped bits, a cut-off file and another adapter's content are found at each read. What
checks out must still stay within this runner's memory, for others may write to the disk.
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

from granatum.adapters_store.limits import RANK_STEP
from granatum.models.base_model import GROUPS, PROJECTIONS
from granatum.runner.adapters.images.image import AdapterImage, ImageShape, check_rank
from granatum.runner.adapters.images.layout import TableRow, padded

_ALIGNMENT = 4096
_FIXED = struct.Struct("<8s32s32sIIQQ")  # magic, digest, key, layers, pages, page bytes, checksum
_CHECKSUM_AT = _FIXED.size - 8
_MAGIC = b"GRANIMG\0"
_FIELDS = (
    ("a_page", np.int32, len(GROUPS)),
    ("a_offset", np.int64, len(GROUPS)),
    ("b_page", np.int32, len(PROJECTIONS)),
    ("b_offset", np.int64, len(PROJECTIONS)),
    ("rank", np.int32, len(PROJECTIONS)),
    ("scale", np.float32, len(PROJECTIONS)),
)
"""The table row's arrays, `[layers, width]` each, in the order of the header."""
_ROW_BYTES = sum(np.dtype(dtype).itemsize * width for _, dtype, width in _FIELDS)
"""Of each layer."""


class DamagedImage(Exception):
    """A file that is no whole image of what was asked for; it can be made again."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What a header says once it has been checked."""

    digest: str
    row: TableRow
    checksums: npt.NDArray[np.uint64]
    """Of each page."""


def write_image(path: Path, digest: str, shape: ImageShape, image: AdapterImage) -> None:
    """Write the file at once or not at all."""
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
    """Pages of the image, as its header says; raises as `read_image`."""
    with _open(path) as file:
        return len(_read_header(file, shape).checksums)


def read_image(path: Path, digest: str, shape: ImageShape, pages: Sequence[memoryview]) -> TableRow:
    """Read the file into as many page buffers as it has pages.

    Raises OSError, DamagedImage if it is not whole, InvalidAdapter if its ranks are too high here.
    """
    with _open(path) as file:
        header = _read_header(file, shape)
        if header.digest != digest or len(header.checksums) != len(pages):
            raise DamagedImage(f"{path} holds {len(header.checksums)} pages of {header.digest}")
        _read_pages(file, pages, header.checksums.tolist())
    return header.row


def _read_pages(file: BinaryIO, pages: Sequence[memoryview], checksums: Sequence[int]) -> None:
    """Fill the buffers. A page is checked in a thread of its own while the next one is read."""
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
    """The file, unbuffered. Whatever else has its name, such as a pipe, is not waited for."""
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedImage(f"{path} is no file")
    _read_ahead(file)
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _read_ahead(file: BinaryIO) -> None:
    """Have the disk bring the whole file, with as many requests at a time as it can serve."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # no file system has to know it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _header(digest: str, shape: ImageShape, row: TableRow, pages: npt.NDArray[np.uint8]) -> bytes:
    arrays = [np.ascontiguousarray(getattr(row, name), dtype) for name, dtype, _ in _FIELDS]
    checksums = np.array([xxhash.xxh3_64_intdigest(page.data) for page in pages], np.uint64)
    layers = row.rank.shape[0]
    fixed = _FIXED.pack(
        _MAGIC, bytes.fromhex(digest), shape.key, layers, len(pages), shape.page_bytes, 0
    )
    data = b"".join([fixed, *(array.tobytes() for array in arrays), checksums.tobytes()])
    header = bytearray(data.ljust(_header_bytes(layers, len(pages)), b"\0"))
    header[_CHECKSUM_AT : _FIXED.size] = _checksum(header).to_bytes(8, "little")
    return bytes(header)


def _header_bytes(layers: int, pages: int) -> int:
    return padded(_FIXED.size + layers * _ROW_BYTES + pages * 8, _ALIGNMENT)


def _checksum(header: bytes | bytearray) -> int:
    """Of all that is in a header beside this number."""
    checksum = xxhash.xxh3_64(header[:_CHECKSUM_AT])
    checksum.update(header[_FIXED.size :])
    return checksum.intdigest()


def _read_header(file: BinaryIO, shape: ImageShape) -> _Header:
    """The header, checked; leaves the file at its first page."""
    layers = shape.base.num_layers
    fixed = file.read(_FIXED.size)
    if len(fixed) != _FIXED.size:
        raise DamagedImage(f"{file.name} ends within its header")
    magic, digest, key, found, pages, page_bytes, checksum = _FIXED.unpack(fixed)
    if (magic, key, found, page_bytes) != (_MAGIC, shape.key, layers, shape.page_bytes):
        raise DamagedImage(f"{file.name} was made for another model or another layout")
    size, expected = os.fstat(file.fileno()).st_size, _header_bytes(layers, pages)
    if size != expected + pages * page_bytes or not pages:
        raise DamagedImage(f"{file.name} has {size} bytes and should have {pages} pages")
    header = fixed + file.read(expected - len(fixed))
    if len(header) != expected or _checksum(header) != checksum:
        raise DamagedImage(f"{file.name} has a damaged header")
    row, end = _table_row(header, layers)
    _check_row(row, shape, pages, file.name)
    return _Header(digest.hex(), row, np.frombuffer(header, np.uint64, pages, end))


def _table_row(header: bytes, layers: int) -> tuple[TableRow, int]:
    """The row, and where it ends."""
    at, arrays = _FIXED.size, dict[str, Any]()
    for field, dtype, width in _FIELDS:
        array = np.frombuffer(header, dtype, layers * width, at).reshape(layers, width)
        arrays[field] = array
        at += array.nbytes
    return TableRow(**arrays), at


def _check_row(row: TableRow, shape: ImageShape, pages: int, name: str) -> None:
    """A row that was written by somebody else must not lead the kernels out of their memory."""
    fault = row.fault(shape.base, pages, shape.page_elements)
    if fault:
        raise DamagedImage(f"{name} would lead out of its pages: {fault}")
    limit = padded(shape.max_rank, RANK_STEP)
    if row.rank.max() > limit:
        layer, index = np.argwhere(row.rank > limit)[0]
        module = shape.base.module_name(int(layer), PROJECTIONS[index])
        check_rank(int(row.rank[layer, index]), shape, module)
