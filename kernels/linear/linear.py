"""The kernel of a linear of few rows, as decoding has them: the bytes of its weight bound its time.

    y = x W^T + b        x [M, K], W [N, K], M up to `MAX_ROWS`, float32 sums, y of x's dtype or
                         float32

A block streams its rows of W through shared memory. Where the rows of W make too few blocks for the
GPU, blocks share K: each block writes a partial sum, and the last block adds all of them in order.
A row's result depends on shapes alone, not on the other rows.

`tuning.py` says how a shape is cut. Shapes that were not measured, or for which the library was
faster, go to torch.
"""

from dataclasses import dataclass

import torch

from granatum.kernels.backend import (
    dot,
    jit,
    overlap_options,
    require,
    require_rows,
    tl,
)
from granatum.kernels.linear.tuning import Config, block_rows


@dataclass(frozen=True, slots=True)
class Workspace:
    """Room for the partial sums of blocks that share K; linears of one stream may share it.

    partials: float32;
    arrivals: int32, one per block of N: blocks that wrote their partial sum; 0 between launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def of_size(cls, partials: int, arrivals: int, device: torch.device) -> "Workspace":
        """Room for `partials` partial sums and `arrivals` blocks of N."""
        return cls(
            torch.empty(partials, dtype=torch.float32, device=device),
            torch.zeros(arrivals, dtype=torch.int32, device=device),
        )


@jit("rows", "splits")
def _linear_kernel(
    x, weight, bias, y, partials, arrivals, rows, splits, K, x_stride, y_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_N columns of y, of one of the splits of K.

    W is the left operand of the tensor cores, so that the instruction has enough rows.
    """
    pid = tl.program_id(0)
    block = pid // splits
    split = pid % splits
    steps = K // BLOCK_K
    begin = split * steps // splits
    end = (split + 1) * steps // splits
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_at = weight + n[:, None] * K + k[None, :]
    x_at = x + m[None, :] * x_stride + k[:, None]
    there = (m < rows)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    turned = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(begin, end):
        xs = tl.load(x_at + step * BLOCK_K, mask=there, other=0.0)
        turned = dot(tl.load(w_at + step * BLOCK_K), xs, turned)
    total = tl.trans(turned)
    real = (m < rows)[:, None] & (n >= 0)[None, :]
    last = True
    if SPLIT:
        tile_at = m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        own = partials + block * splits * (BLOCK_M * BLOCK_N) + tile_at
        tl.store(own + split * (BLOCK_M * BLOCK_N), total, mask=real)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + block, 1, sem="acq_rel", scope="gpu") == splits - 1
        if last:
            tl.store(arrivals + block, 0)
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for s in range(splits):
                part = own + s * (BLOCK_M * BLOCK_N)
                total += tl.load(part, mask=real, other=0.0, cache_modifier=".cg")
    if last:
        if bias is not None:
            total += tl.load(bias + n)[None, :].to(tl.float32)
        tl.store(y + m[:, None] * y_stride + n[None, :], total, mask=real)


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: Workspace,
    config: Config,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel in one configuration; the dtypes of x, weight and bias were checked.

    out [M, N]: where y goes, of x's dtype or float32; None: y is new, of x's dtype.
    """
    (rows, in_features), out_features = x.shape, weight.shape[0]
    blocks, block_m = out_features // config.block_n, block_rows(rows)
    fits = out_features % config.block_n == 0 and in_features % config.block_k == 0
    require(fits, f"a weight of {tuple(weight.shape)} does not divide by {config}")
    if config.splits > 1:
        needed = block_m * out_features * config.splits
        enough = workspace.partials.numel() >= needed and workspace.arrivals.numel() >= blocks
        require(enough, f"the workspace must have {needed} partial sums, {blocks} arrivals")
    y = x.new_empty(rows, out_features) if out is None else out
    require_rows("y", y, (rows, out_features))
    require(y.dtype in (x.dtype, torch.float32), f"y is {y.dtype}: {x.dtype} or float32 is needed")
    _linear_kernel[(blocks * config.splits,)](
        x, weight, bias, y, workspace.partials, workspace.arrivals, rows, config.splits,
        in_features, x.stride(0), y.stride(0),
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=config.splits > 1,
        num_warps=config.warps, num_stages=config.stages, **overlap_options(x),
    )  # fmt: skip
    return y
