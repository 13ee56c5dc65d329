"""The header of a safetensors file that nobody vouches for.

A file is `header length (8 bytes, little-endian) | header (JSON) | data`. The header gives each
tensor's dtype, shape and place in the data; together the tensors must cover the data exactly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from granatum.adapters_store.format.json_text import parse_object
from granatum.adapters_store.limits import UploadLimits
from granatum.adapters_store.names import shown
from granatum.v1.errors import InvalidAdapter

WEIGHTS_FILE = "adapter_model.safetensors"
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the dtypes that can be served."""
_LENGTH_BYTES = 8
_PART_BYTES = 4 << 20
_MAX_DIMENSIONS = 8
_CONVERT = "which could run code: make a safetensors file of it with granatum adapters convert"
_OTHERS = {
    b"PK\x03\x04": f"a zip archive as torch.save writes it, {_CONVERT}",
    b"\x80\x02": f"a pickle, {_CONVERT}",
    b"\x80\x03": f"a pickle, {_CONVERT}",
    b"\x80\x04": f"a pickle, {_CONVERT}",
    b"\x80\x05": f"a pickle, {_CONVERT}",
    b"GGUF": "a GGUF file: upload the PEFT adapter that it was made from",
    b"version ": "a Git LFS pointer to the file: run git lfs pull, and upload it again",
}
"""Other files by their first bytes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor; its bytes are those from `begin` to `end` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def invalid_weights(text: str) -> InvalidAdapter:
    """The error of a bad weights file."""
    return InvalidAdapter(f"{WEIGHTS_FILE}: {text}", field=WEIGHTS_FILE)


def read_parts(file: BinaryIO, entry: TensorEntry) -> Iterator[tuple[int, bytes]]:
    """A tensor's bytes in parts of bounded size, each with its place in the file.

    Nothing else may move in `file` meanwhile.
    """
    file.seek(entry.begin)
    for begin in range(entry.begin, entry.end, _PART_BYTES):
        yield begin, file.read(min(_PART_BYTES, entry.end - begin))


def read_header(path: Path, limits: UploadLimits) -> dict[str, TensorEntry]:
    """The file's tensors by name. InvalidAdapter says what is wrong with the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(file, size, limits)
        header = parse_object(file.read(length), _invalid_header)
    data_begin = _LENGTH_BYTES + length
    entries = [_entry(name, fields, data_begin) for name, fields in _tensors(header)]
    _check_cover(entries, data_begin, size)
    return {entry.name: entry for entry in entries}


def _header_length(file: BinaryIO, size: int, limits: UploadLimits) -> int:
    start = file.read(_LENGTH_BYTES)
    # A header's length may by chance begin like another kind of file. So the byte behind the length
    # decides: a header has a brace there, and no other kind of file has.
    if file.read(1) != b"{":
        for magic, kind in _OTHERS.items():
            if start.startswith(magic):
                raise invalid_weights(f"is really {kind}")
    file.seek(_LENGTH_BYTES)
    if len(start) < _LENGTH_BYTES:
        raise invalid_weights("is shorter than the 8 bytes that a safetensors file begins with")
    length = int.from_bytes(start, "little")
    if length > limits.max_header_bytes:
        raise invalid_weights(
            f"claims a header of {length} bytes, more than the {limits.max_header_bytes} allowed: "
            "is it a safetensors file?"
        )
    if _LENGTH_BYTES + length > size:
        raise invalid_weights(
            f"claims a header of {length} bytes, but has {size} bytes in all: it was cut off"
        )
    return length


def _invalid_header(text: str) -> InvalidAdapter:
    return invalid_weights(f"the header {text}")


def _tensors(header: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, fields in header.items():
        if name != "__metadata__":
            yield name, fields
        elif not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
            raise invalid_weights("the header's __metadata__ must be an object of texts")


def _entry(name: str, fields: Any, data_begin: int) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(name, "its header entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _bad(
            name,
            f"dtype {shown(str(dtype))} cannot be served: save it as float32, float16 or bfloat16",
        )
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _bad(name, "its shape must be a short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(name, "its data_offsets must be two positions")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise _bad(
            name, f"its data_offsets {begin} to {end} do not hold shape {list(shape)} of {dtype}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**48 for size in value
    )


def _check_cover(entries: list[TensorEntry], data_begin: int, size: int) -> None:
    at = data_begin
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < at:
            raise _bad(entry.name, "its data overlaps another tensor's")
        if entry.begin > at:
            raise _bad(entry.name, f"{entry.begin - at} bytes before its data belong to no tensor")
        at = entry.end
    if at > size:
        raise invalid_weights(
            f"its tensors need {at} bytes, but it has {size}: it was cut off, upload it again"
        )
    if at < size:
        raise invalid_weights(f"{size - at} bytes at its end belong to no tensor")


def _bad(name: str, text: str) -> InvalidAdapter:
    return invalid_weights(f"tensor {shown(name)}: {text}")
