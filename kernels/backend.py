"""Triton, or stand-ins where Triton is missing; then the torch twins compute.

`triton` and `tl` stand for Triton's modules in every file with kernels, `jit` for its decorator.
A launcher asks `runs_kernel` whether its Triton kernel or its torch twin serves.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch

from granatum.kernels.device import gpu_of

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda function, **_options: function)
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False

__all__ = [
    "INTERPRETING",
    "compiling_ahead",
    "dot",
    "jit",
    "may_compile_ahead",
    "overlap_options",
    "require",
    "require_rows",
    "runs_kernel",
    "tl",
    "triton",
]

INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels on the CPU; it decides that when it is first imported."""
_MOST_COMPILATIONS = 16
"""At a time; each takes some 100 MiB."""


def jit(*runtime_integers: str) -> Callable[[Callable[..., None]], Any]:
    """Triton's kernel of a function; the integers named never lead to another compilation."""

    def decorate(function: Callable[..., None]) -> Any:
        return may_compile_ahead(triton.jit(function, do_not_specialize=list(runtime_integers)))

    return decorate


_ahead = ContextVar("_ahead", default=False)


def may_compile_ahead(kernel: Any) -> Any:
    """The same kernel, which `compiling_ahead` keeps from running."""
    if not HAS_TRITON or INTERPRETING:
        return kernel
    launch = kernel.run

    def run(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(*args, grid=grid, warmup=warmup or _ahead.get(), **options)

    kernel.run = run
    return kernel


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within the block, launches compile their kernels, several at a time, and run nothing.

    All kernels are compiled at the end of the block. Threads serve, because Triton holds the
    interpreter's lock for about a third of a compilation alone.
    """
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(min(cores, _MOST_COMPILATIONS)) as pool, triton.AsyncCompileMode(pool):
        token = _ahead.set(True)
        try:
            yield
        finally:
            _ahead.reset(token)


_INTERPRETED = tl.constexpr(INTERPRETING)


@jit()
def dot(a, b, total):
    """total + a @ b on the tensor cores. Float32 keeps its full precision: three tf32 products.

    The interpreter keeps bfloat16 as bit patterns and would multiply these, so it converts first.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernel serves `tensor`'s device; if not, the torch twin does."""
    return (tensor.is_cuda and HAS_TRITON) or INTERPRETING


def overlap_options(tensor: torch.Tensor) -> dict[str, bool]:
    """Options with which a kernel on `tensor`'s device may start while its predecessor ends.

    The kernel takes PDL as a constant. If it is set, the kernel keeps three rules:

    - A block that has work calls `gdc_wait` before it reads what a kernel of the step writes, and
      before it writes anything. Then the block calls `gdc_launch_dependents`. The shrinks of few
      rows alone call it before they wait: they launch the expand early. Other kernels must not, for
      kernels that start further ahead take places on the GPU that the next kernel needs.
    - At least one block waits, even if no block has work. So a kernel is complete only after its
      predecessor, and then all kernels before it are complete as well.
    - Before it waits, a block may read weights, and what was copied to the device before the step.

    A kernel need not wait for data that was complete before its predecessor's own wait ended, if
    the predecessor keeps the rules. Example: the shrink beside its linear does not wait for x.
    """
    if gpu_of(tensor.device).overlaps:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def require(condition: bool, message: str) -> None:
    """Refuse a call whose shapes, strides or dtypes an op cannot take.

    Raises:
        ValueError: with `message`, unless `condition` holds.
    """
    if not condition:
        raise ValueError(message)


def require_rows(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Refuse `tensor` unless it has this shape and adjacent elements in its last dimension.

    Raises:
        ValueError: naming the tensor, its shape and its strides.
    """
    if tensor.shape != tuple(shape) or (tensor.stride(-1) != 1 and shape[-1] > 1):
        found = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be {tuple(shape)} with adjacent last elements, not {found}")
