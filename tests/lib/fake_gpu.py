"""A GPU that is not there: launches compile their kernels for it and run nothing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from granatum.kernels import device

GPUS = {
    80: ("NVIDIA A100", 108, 166912),
    86: ("NVIDIA RTX A6000", 84, 101376),
    89: ("NVIDIA L40S", 142, 101376),
    90: ("NVIDIA H200", 132, 232448),
    100: ("NVIDIA B200", 148, 232448),
    120: ("NVIDIA RTX PRO 6000", 188, 101376),
}
"""By compute capability: a GPU's name, multiprocessors, and bytes of shared memory of a block."""


class OnGpu(torch.Tensor):
    """A tensor of the host that says it is on the first GPU."""

    is_cuda = property(lambda _self: True)
    device = property(lambda _self: torch.device("cuda", 0))

    def get_device(self) -> int:
        """The first."""
        return 0


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A view of `tensor` that says it is on the GPU."""
    return tensor.as_subclass(OnGpu)


@contextmanager
def compiling(sm: int, made: Callable[[Any, tuple[int, ...]], None]) -> Iterator[None]:
    """Kernels that are launched are compiled for a GPU of capability `sm` and do not run.

    `made` is called with each compiled kernel and its grid.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    name, multiprocessors, shared = GPUS[sm]
    seen = SimpleNamespace(
        name=name,
        major=sm // 10,
        minor=sm % 10,
        multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=shared,
    )
    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", sm, 32),
        get_current_device=lambda: sm,  # Triton keeps one compiler for each device
        get_current_stream=lambda _device: 0,
        utils=SimpleNamespace(get_device_properties=lambda _device: {"max_shared_mem": shared}),
    )

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> None:
            made(kernel.run(*args, grid=grid, warmup=True, **options), grid)

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.JITFunction, "__getitem__", launch))
        stack.enter_context(mock.patch.object(driver, "_active", active))
        for function, answer in {
            "get_device_name": name,
            "get_device_capability": (sm // 10, sm % 10),
            "get_device_properties": seen,
        }.items():
            told = mock.Mock(return_value=answer)
            stack.enter_context(mock.patch.object(torch.cuda, function, told))
        device.gpu.cache_clear()  # another GPU may have been seen at this index
        stack.callback(device.gpu.cache_clear)
        yield
