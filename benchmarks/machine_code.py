"""The machine code of every kernel, compiled as its launchers launch it, on a machine without GPU.

    PYTHONPATH=tests/lib python benchmarks/machine_code.py OUT.json [--sm 90] [--against OLD.json]

OUT names each launch of `kernel_cases.py` and gives a digest of what the GPU would run: the
instructions, the shared memory, the warps and the grid. Line numbers, file names and the kernel's
own name do not count. `--against` lists the launches that differ and exits 1 if there are any.
"""

import argparse
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # Triton reads it when it is first imported

from fake_gpu import GPUS, compiling
from kernel_cases import cases

_LAUNCH_FACTS = ("shared", "num_warps", "maxnreg", "launch_pdl")


def text_sections(cubin: bytes) -> Iterator[bytes]:
    """The instructions in a 64-bit ELF file."""
    headers, (size, count, names) = (
        struct.unpack_from("<Q", cubin, 0x28)[0],
        struct.unpack_from("<HHH", cubin, 0x3A),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, headers + i * size) for i in range(count)]
    strings = sections[names][4]
    for name, *_, offset, length, _link, _info, _align, _entry in sections:
        start = strings + name
        if cubin[start : cubin.index(b"\0", start)].startswith(b".text"):
            yield cubin[offset : offset + length]


def digest(kernel: Any, grid: tuple[int, ...]) -> str:
    """What the GPU would run of a launch, in short."""
    found = hashlib.sha256(b"".join(text_sections(kernel.asm["cubin"])))
    facts = [getattr(kernel.metadata, name, None) for name in _LAUNCH_FACTS]
    found.update(json.dumps([grid, facts]).encode())
    return found.hexdigest()[:16]


def compile_all(sm: int) -> dict[str, str]:
    """The digest of each launch, by its case and its place among the case's launches."""
    digests: dict[str, str] = {}
    launches: list[str] = []
    with compiling(sm, lambda kernel, grid: launches.append(digest(kernel, grid))):
        for name, launch in cases():
            launches.clear()
            launch()
            digests |= {f"{name} [{place}]": found for place, found in enumerate(launches)}
            print(name, len(launches), flush=True)
    return digests


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The launches that differ, or are in one of them alone."""
    return [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def main() -> int:
    """Compile, write, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--sm", type=int, default=90, choices=GPUS)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    made = compile_all(args.sm)
    args.out.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    found = differences(json.loads(args.against.read_text()), made) if args.against else []
    print(*(f"differs: {name}" for name in found), f"{len(made)} launches", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
