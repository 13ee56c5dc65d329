"""RMS normalisation with what precedes it: the sum of the residual, or the embedding."""

import torch

from granatum.kernels.backend import (
    jit,
    overlap_options,
    require,
    require_rows,
    runs_kernel,
    tl,
    triton,
)
from granatum.kernels.layer import reference

_WARP_ELEMENTS = 1024
"""Columns for each warp of the block that takes a row."""


@jit()
def _rms_norm_kernel(
    x, residual, indices, last, weight, out, x_stride, residual_stride, out_stride, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
    SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: a row of `out`.

    ADD: the row is the residual's row plus SCALE times x; else SCALE times x. KEEP: the row is also
    written to the residual.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    weights = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    source = row
    if indices is not None:
        source = tl.load(indices + row).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if last is not None:
        drawn = tl.load(last - 1 - source, mask=source < 0, other=0).to(tl.int64)
        source = tl.where(source < 0, drawn, source)
    values = tl.load(x + source * x_stride + n, mask=inside, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        values *= SCALE
    if ADD:
        at = residual + source * residual_stride + n
        values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADD or SCALE != 1.0:
        values = values.to(residual.dtype.element_ty).to(tl.float32)
    if KEEP:
        tl.store(residual + row * residual_stride + n, values, mask=inside)
    scale = tl.rsqrt(tl.sum(values * values) / N + eps)
    tl.store(out + row * out_stride + n, values * scale * weights, mask=inside)


def embed_rms_norm(
    tokens: torch.Tensor,
    last: torch.Tensor,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """residual = scale * embedding[tokens]; out = residual / sqrt(mean(residual^2) + eps) * weight.

    tokens int [T]: a negative token stands for last[-1 - token]; last int [seats]; embedding
    [vocabulary, N]; weight [N]; residual, out [T, N]. Rows have adjacent elements and lie evenly
    apart. The scaled embedding is rounded to the residual's dtype. The norm is taken in float32.
    """
    if not runs_kernel(embedding):
        reference.embed_rms_norm(tokens, last, embedding, weight, eps, residual, out, scale=scale)
        return
    require(embedding.dtype == residual.dtype, "embedding and residual must be of one dtype")
    _launch(embedding, residual, tokens, last, weight, eps, out, add=False, scale=scale)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """residual += scale * x, then out = residual / sqrt(mean(residual^2) + eps) * weight.

    x, residual, out [T, N], weight [N]; `out` is x unless given. The sum is taken in float32 and
    rounded once, to the residual's dtype; the norm is that of the rounded sum. With rows int [S],
    out [S, N] holds these rows alone, and the residual stays as it is.
    """
    out = x if out is None else out
    if not runs_kernel(x):
        reference.add_rms_norm(x, residual, weight, eps, out, rows, scale=scale)
        return
    require_rows("residual", residual, tuple(x.shape))
    _launch(x, residual, rows, None, weight, eps, out, add=True, scale=scale)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    indices: torch.Tensor | None,
    last: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    add: bool,
    scale: float,
) -> None:
    n = x.shape[1]
    rows = (x if indices is None else indices).shape[0]
    keep = indices is None or not add
    require_rows("x", x, tuple(x.shape))
    require_rows("out", out, (rows, n))
    if keep:
        require_rows("residual", residual, (rows, n))
    require(weight.shape == (n,) and weight.is_contiguous(), f"weight must be [{n}], contiguous")
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(rows,)](
        x, residual, indices, last, weight, out, x.stride(0), residual.stride(0), out.stride(0),
        eps, N=n, BLOCK_N=block, ADD=add, KEEP=keep, SCALE=scale,
        num_warps=min(8, max(1, block // _WARP_ELEMENTS)), **overlap_options(x),
    )  # fmt: skip
