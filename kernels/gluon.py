"""Gluon: kernels that say which lane holds which element; the interpreter does not know it.

Where Gluon is missing, files with such kernels still import, and kernels in Triton or the torch
twins serve.
"""

from collections.abc import Callable
from typing import Any

from granatum.kernels.backend import HAS_TRITON, INTERPRETING, may_compile_ahead, tl

AVAILABLE = HAS_TRITON and not INTERPRETING
if AVAILABLE:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

    if hasattr(async_copy, "async_load"):
        async_load = async_copy.async_load
    else:
        async_load = async_copy.async_copy_global_to_shared  # its former name
else:
    gl, async_copy, async_load, mma_v2 = tl, None, None, None  # for annotations

__all__ = [
    "AVAILABLE",
    "async_copy",
    "async_load",
    "gl",
    "jit",
    "launch_dependents",
    "mma_v2",
    "of_triton",
    "sync_warp",
    "wait",
]


def jit(*runtime_integers: str) -> Callable[[Callable[..., Any]], Any]:
    """Gluon's kernel of a function; the integers named never lead to another compilation."""

    def decorate(function: Callable[..., Any]) -> Any:
        if not AVAILABLE:
            return function
        kernel = gluon.jit(function, do_not_specialize=list(runtime_integers))
        return may_compile_ahead(kernel)

    return decorate


def of_triton(helper: Any) -> Any:
    """A Triton helper for kernels in Gluon. It must make no tensor but from its arguments."""
    return gluon.jit(helper.fn) if AVAILABLE else helper


@jit()
def launch_dependents():
    """The next kernel may start."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@jit()
def wait():
    """Wait until the kernel before this one is complete."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@jit()
def sync_warp():
    """Make what each lane of the warp has written visible to all its lanes."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
