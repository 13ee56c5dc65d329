"""What a weights file is: the length of its header may have any bytes."""

import json
import pickle
from io import BytesIO
from pathlib import Path

import pytest
import torch
from adapter_files import Tensor, header_of
from hypothesis import given
from hypothesis import strategies as st

from granatum.adapters_store.format.safetensors_file import read_header
from granatum.adapters_store.limits import DEFAULT_LIMITS
from granatum.v1.errors import InvalidAdapter

PARTS = {"a": Tensor("F32", (1,), b"\0\0\0\0")}
LEAST = len(json.dumps(header_of(PARTS)))
PICKLE_PROTOCOLS = (2, 3, 4, 5)


def write(path: Path, length: int) -> Path:
    """A valid file. Its header has this length, with blanks at its end as safetensors writes."""
    text = json.dumps(header_of(PARTS)).encode().ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + text + PARTS["a"].data)
    return path


@pytest.mark.parametrize("second", PICKLE_PROTOCOLS)
@pytest.mark.parametrize("third", [0, 1, 7, 31])
def test_lengths_that_begin_like_a_pickle(second: int, third: int, tmp_path: Path) -> None:
    length = 0x80 | second << 8 | third << 16
    if length <= DEFAULT_LIMITS.max_header_bytes:
        assert read_header(write(tmp_path / "weights", length), DEFAULT_LIMITS).keys() == {"a"}


def test_every_low_byte_and_every_second_byte(tmp_path: Path) -> None:
    for low in range(256):
        file = write(tmp_path / "weights", 0x100 + low)
        assert read_header(file, DEFAULT_LIMITS).keys() == {"a"}, hex(0x100 + low)
    for second in range(1, 256):
        file = write(tmp_path / "weights", 0x80 | second << 8)
        assert read_header(file, DEFAULT_LIMITS).keys() == {"a"}, hex(0x80 | second << 8)


@given(length=st.integers(LEAST, 1 << 18))
def test_any_length(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = write(tmp_path_factory.getbasetemp() / "weights", length)
    assert read_header(file, DEFAULT_LIMITS).keys() == {"a"}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_recognised(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidAdapter, match=r"run code: .* granatum adapters convert"):
        read_header(file, DEFAULT_LIMITS)


@pytest.mark.parametrize("protocol", PICKLE_PROTOCOLS)
def test_pickles_are_recognised(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    data = BytesIO()
    pickle.Pickler(data, protocol).dump({"{": b"{" * 20})
    file.write_bytes(data.getvalue())
    with pytest.raises(InvalidAdapter, match="is really a pickle"):
        read_header(file, DEFAULT_LIMITS)
