"""The kernels compile for every GPU that we know of, within the shared memory that it has."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import GPUS, compiling

from granatum.kernels import backend
from granatum.kernels.device import Gpu, gpu
from granatum.kernels.linear import tuning as linear
from granatum.kernels.tables import tables

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backend.INTERPRETING, reason="compiles nothing")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CASES = (
    "add_lora 8b rank 64 torch.bfloat16 by 2 group 0",
    "add_lora 8b rank 256 torch.bfloat16 by 64 group 3",
    "silu_mul_with_lora 8b rank 64 torch.bfloat16 by 64",
    "rope_with_lora 8b rank 64 torch.bfloat16 by 64 normed False",
    "decode_attention 32/8x128 torch.bfloat16 pages of 16 of 64 normed False",
    "prefill_attention 32/8x128 torch.bfloat16 pages of 16",
    "linear 4096->4096 of 32 biased False",
    "logits 4096->32000 of 32",
)
"""The kernels that use tensor cores, much shared memory or their own layout of registers."""
CUT = {"block_n": 64, "block_k": 128, "splits": 2, "warps": 4, "stages": 3}
"""A cut of the linear that fits the least shared memory; most of these GPUs have no table."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Callable[[], object]]]:
    """What launches each case, once a GPU is there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(tables, "_users", {})
    from kernel_cases import cases

    @cache
    def named() -> dict[str, Callable[[], object]]:
        found: Gpu = gpu(0)
        for n in (4096, 32000):
            tables.put(found, linear.OP, linear.shape_key(4096, n), 32, CUT)
        return {name: launch for name, launch in cases() if name in CASES}

    return named


@pytest.mark.parametrize("sm", GPUS)
def test_kernels_compile_within_shared_memory(
    sm: int, launches: Callable[[], dict[str, Callable[[], object]]]
) -> None:
    made: list[Any] = []
    with compiling(sm, lambda kernel, _grid: made.append(kernel)):
        room, overlaps = gpu(0).shared_memory, gpu(0).overlaps
        named = launches()
        assert set(named) == set(CASES)
        for launch in named.values():
            launch()
    assert len(made) > len(CASES)
    for kernel in made:
        assert kernel.metadata.shared <= room, kernel.name
        assert overlaps or "griddepcontrol" not in kernel.asm["ptx"], kernel.name
    assert overlaps == any("griddepcontrol" in kernel.asm["ptx"] for kernel in made)
