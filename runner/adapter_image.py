"""An adapter's page images: its matrices as they will lie on the device, in one file.

    header, padded to 4096 bytes | page 0 | page 1 | ...

The header holds what the table row needs; the pages are the arena's own bytes. Bringing an adapter
from disk is then one read and one copy per page.
"""

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from granatum.adapters_store.base_model import GROUPS, PROJECTIONS, BaseModel
from granatum.adapters_store.peft_config import CONFIG_FILE, ModuleSpec, PeftConfig, tensor_name
from granatum.adapters_store.safetensors_file import WEIGHTS_FILE
from granatum.runner.adapter_layout import (
    RANK_STEP,
    AdapterLayout,
    Place,
    TableRow,
    lay_out,
    padded,
)
from granatum.v1.errors import InvalidAdapter

FORMAT = 1
_ALIGNMENT = 4096
_FIXED = struct.Struct("<8s32s32sIIQI")  # magic, digest, key, layers, pages, page bytes, crc
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


class DamagedImage(Exception):
    """A file that is no whole image of what was asked for; it can be built again."""


@dataclass(frozen=True, slots=True)
class ImageShape:
    """What images of one runner have in common: only those of an equal shape fit its arena."""

    base: BaseModel
    dtype: torch.dtype
    page_elements: int

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return self.page_elements * self.dtype.itemsize

    @property
    def key(self) -> bytes:
        """32 bytes that differ for every other shape."""
        parts = [FORMAT, self.base.fingerprint, str(self.dtype), self.page_elements]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter in memory: `pages` `[pages, page_elements]` and its table row."""

    pages: torch.Tensor
    row: TableRow


def build_image(directory: Path, shape: ImageShape) -> AdapterImage:
    """Pack PEFT's two files. Raises InvalidAdapter if they are not what the store validated."""
    config = PeftConfig.parse((directory / CONFIG_FILE).read_bytes())
    modules = config.modules(shape.base)
    layout = lay_out(shape.base, modules, shape.page_elements)
    pages = torch.zeros(layout.pages, shape.page_elements, dtype=shape.dtype)
    try:
        with safe_open(str(directory / WEIGHTS_FILE), framework="pt") as weights:
            for place in layout.places:
                _fill(_view(pages, place), weights, shape.base, modules, place)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InvalidAdapter(f"{WEIGHTS_FILE} cannot be packed: {error}") from error
    return AdapterImage(pages, layout.row)


def random_image(shape: ImageShape, rank: int, seed: int) -> AdapterImage:
    """A random adapter of `rank` on every projection, for measurements without files."""
    modules = {
        (layer, name): ModuleSpec(rank, 1.0)
        for layer in range(shape.base.num_layers)
        for name in PROJECTIONS
    }
    layout = lay_out(shape.base, modules, shape.page_elements)
    return AdapterImage(_random_pages(layout, shape, seed), layout.row)


def write_image(path: Path, digest: str, shape: ImageShape, image: AdapterImage) -> None:
    """Write the file at once or not at all."""
    header = _header(digest, shape, image)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            file.write(image.pages.view(torch.uint8).numpy().data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def image_pages(path: Path, shape: ImageShape) -> int:
    """Pages of the image, as its size says; DamagedImage if it is not whole."""
    with path.open("rb") as file:
        return _read_fixed(file, shape)[1]


def read_image(path: Path, digest: str, shape: ImageShape, pages: Sequence[memoryview]) -> TableRow:
    """Read the file into as many page buffers as it has pages; DamagedImage if it is not whole."""
    with path.open("rb", buffering=0) as file:
        _read_ahead(file)
        found, count, row = _read_fixed(file, shape)
        if found != digest or count != len(pages):
            raise DamagedImage(f"{path} holds {count} pages of {found}")
        for page in pages:
            if file.readinto(page) != shape.page_bytes:
                raise DamagedImage(f"{path} ends early")
    return row


def _read_ahead(file: BinaryIO) -> None:
    """Have the disk bring the whole file, with as many requests at a time as it can serve."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # no file system has to know it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _fill(
    matrix: torch.Tensor,
    weights: safe_open,
    base: BaseModel,
    modules: Mapping[tuple[int, str], ModuleSpec],
    place: Place,
) -> None:
    """Copy a piece's tensors into its place, where everything beyond the true ranks stays zero."""
    piece = place.piece
    if piece.projection is not None:
        module = base.module_name(piece.layer, PROJECTIONS[piece.projection])
        b = _tensor(weights, tensor_name(module, "B"))
        matrix[: b.shape[1]].copy_(b.T)
        return
    assert piece.group is not None
    names = list(GROUPS.values())[piece.group]
    present = [name for name in names if (piece.layer, name) in modules]
    start = 0
    for name in present:
        module = base.module_name(piece.layer, name)
        a = _tensor(weights, tensor_name(module, "A"))
        matrix[start : start + a.shape[0]].copy_(a)
        start += padded(a.shape[0], RANK_STEP)


def _tensor(weights: safe_open, name: str) -> torch.Tensor:
    tensor: torch.Tensor = weights.get_tensor(name)  # type: ignore[no-untyped-call]
    return tensor


def _view(pages: torch.Tensor, place: Place) -> torch.Tensor:
    """The piece's matrix `[rows, columns]` within the pages."""
    rows, columns = place.piece.rows, place.piece.columns
    return pages[place.page].narrow(0, place.offset, rows * columns).view(rows, columns)


def _random_pages(layout: AdapterLayout, shape: ImageShape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pages = torch.empty(layout.pages, shape.page_elements, dtype=shape.dtype)
    return pages.normal_(std=0.02, generator=generator)


def _header(digest: str, shape: ImageShape, image: AdapterImage) -> bytes:
    arrays = b"".join(
        np.ascontiguousarray(getattr(image.row, name), dtype).tobytes()
        for name, dtype, _ in _FIELDS
    )
    layers, pages = image.row.rank.shape[0], image.pages.shape[0]
    crc = zlib.crc32(arrays)
    fixed = _FIXED.pack(
        _MAGIC, bytes.fromhex(digest), shape.key, layers, pages, shape.page_bytes, crc
    )
    return (fixed + arrays).ljust(_header_bytes(layers), b"\0")


def _header_bytes(layers: int) -> int:
    used = _FIXED.size + layers * sum(
        np.dtype(dtype).itemsize * width for _, dtype, width in _FIELDS
    )
    return padded(used, _ALIGNMENT)


def _read_fixed(file: BinaryIO, shape: ImageShape) -> tuple[str, int, TableRow]:
    """Digest, pages and table row; leaves the file at its first page."""
    size = os.fstat(file.fileno()).st_size
    layers = shape.base.num_layers
    header = file.read(_header_bytes(layers))
    if len(header) != _header_bytes(layers):
        raise DamagedImage(f"{file.name} ends within its header")
    magic, digest, key, found, pages, page_bytes, crc = _FIXED.unpack_from(header)
    if (magic, key, found, page_bytes) != (_MAGIC, shape.key, layers, shape.page_bytes):
        raise DamagedImage(f"{file.name} was made for another model or another layout")
    if size != len(header) + pages * page_bytes:
        raise DamagedImage(f"{file.name} has {size} bytes instead of {pages} pages")
    return digest.hex(), pages, _table_row(header, layers, crc, file.name)


def _table_row(header: bytes, layers: int, crc: int, name: str) -> TableRow:
    at, arrays = _FIXED.size, dict[str, Any]()
    for field, dtype, width in _FIELDS:
        array = np.frombuffer(header, dtype, layers * width, at).reshape(layers, width)
        arrays[field] = array
        at += array.nbytes
    if zlib.crc32(header[_FIXED.size : at]) != crc:
        raise DamagedImage(f"{name} has a damaged header")
    return TableRow(**arrays)
