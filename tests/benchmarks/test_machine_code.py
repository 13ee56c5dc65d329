"""The comparison of machine code sees what a kernel computes, and nothing else."""

import struct
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def elf(sections: dict[str, bytes]) -> bytes:
    """A 64-bit file of these sections, its table of names the last one."""
    names = b"\0".join(name.encode() for name in (*sections, ".names")) + b"\0"
    contents = [*sections.values(), names]
    header, body = bytearray(64), b"".join(contents)
    struct.pack_into("<Q", header, 0x28, 64 + len(body))
    struct.pack_into("<HHH", header, 0x3A, 64, len(contents), len(contents) - 1)
    table, name_at, offset = b"", 0, 64
    for name, content in zip((*sections, ".names"), contents, strict=True):
        table += struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, offset, len(content), 0, 0, 1, 0)
        name_at, offset = name_at + len(name) + 1, offset + len(content)
    return bytes(header) + body + table


def test_only_instructions_are_read() -> None:
    from machine_code import text_sections

    file = elf({".text.kernel": b"add", ".debug_line": b"lines", ".text.other": b"multiply"})
    assert list(text_sections(file)) == [b"add", b"multiply"]


def test_what_differs_is_named() -> None:
    from machine_code import differences

    old, new = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    assert differences(old, new) == ["b", "c", "d"]
