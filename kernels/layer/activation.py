"""The activation of a gated MLP."""

import torch

from granatum.kernels.backend import jit, overlap_options, require_rows, runs_kernel, tl, triton
from granatum.kernels.layer import reference

_BLOCK = 1024


@jit()
def silu(x):
    """x / (1 + e^-x); x in float32."""
    return x / (1.0 + tl.exp(-x))


@jit()
def _silu_mul_kernel(
    gate_up, out, in_stride, out_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_N columns of a row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = gate_up + row * in_stride + n
    gate = tl.load(at, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(at + N, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + n, silu(gate) * up, mask=n < N)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up, in float32; gate_up [T, 2 N] holds gate, then up; out [T, N]."""
    rows, n = out.shape
    require_rows("gate_up", gate_up, (rows, 2 * n))
    require_rows("out", out, (rows, n))
    if not runs_kernel(out):
        reference.silu_mul(gate_up, out)
        return
    _silu_mul_kernel[(rows, triton.cdiv(n, _BLOCK))](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        N=n,
        BLOCK_N=_BLOCK,
        num_warps=4,
        **overlap_options(out),
    )
