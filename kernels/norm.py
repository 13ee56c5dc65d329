"""RMS normalisation, alone or fused with the residual that precedes it."""

import torch

from granatum.kernels import reference_layer as reference
from granatum.kernels.backend import (
    jit,
    overlap_options,
    require,
    require_rows,
    runs_kernel,
    tl,
    triton,
)

_WARP_ELEMENTS = 1024
"""Columns that one warp of a row's block takes."""


@jit()
def _rms_norm_kernel(
    x, residual, weight, out, x_stride, residual_stride, out_stride, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: a row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    weights = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    values = tl.load(x + row * x_stride + n, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual + row * residual_stride + n
        values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / N + eps)
    tl.store(out + row * out_stride + n, values * scale * weights, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row in float32.

    x, out [..., N] with adjacent elements in a row and rows evenly apart; weight [N]. `out` may be
    x. Rows may be those of heads, [T, heads, head_dim], if a token's heads are adjacent.
    """
    if not runs_kernel(x):
        reference.rms_norm(x, weight, eps, out)
        return
    _launch(_rows(x), None, weight, eps, _rows(out))


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> None:
    """residual += x, then out = rms_norm(residual); `out` is x unless given.

    x, residual, out [T, N]; the norm is that of the rounded residual.
    """
    out = x if out is None else out
    if not runs_kernel(x):
        reference.add_rms_norm(x, residual, weight, eps, out)
        return
    _launch(_rows(x), _rows(residual), weight, eps, _rows(out))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, N], a view."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    rows, n = x.shape
    for name, tensor in (("x", x), ("residual", x if residual is None else residual), ("out", out)):
        require_rows(name, tensor, (rows, n))
    require(weight.shape == (n,) and weight.is_contiguous(), f"weight must be [{n}], contiguous")
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        N=n,
        BLOCK_N=block,
        ADD=residual is not None,
        num_warps=min(8, max(1, block // _WARP_ELEMENTS)),
        **overlap_options(x),
    )
