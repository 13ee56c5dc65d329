"""A linear layer of few rows, as decoding has them: bound by the bytes of its weight.

    y = x W^T + b        x [M, K], W [N, K], M up to `MAX_ROWS`, float32 sums

A block streams its rows of W through shared memory. Where N has too few rows
of blocks for the GPU, blocks share K: each writes a partial sum, and the last to arrive adds all of
them in order. A row's result depends on shapes alone, not on the other rows.

`tuning.py` says how a shape is cut. Shapes that were not measured, or for which the library was
faster, go to torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from granatum.kernels.backend import (
    dot,
    jit,
    overlap_options,
    require,
    require_rows,
    tl,
)
from granatum.kernels.linear.tuning import ROWS, Config, block_rows, config_for


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial sums, float32, and arrivals per block of N, int32, zero between launches."""

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def of_size(cls, partials: int, arrivals: int, device: torch.device) -> "Workspace":
        """Room for so many."""
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

    W is the left operand of the tensor cores, which so have rows enough.
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


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, workspace: Workspace
) -> torch.Tensor:
    """x W^T + b [M, N], new; x [M, K], weight [N, K] contiguous, bias [N].

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    rows, in_features = x.shape
    config = config_for(rows, weight)
    if config is None:
        return functional.linear(x, weight, bias)
    require_rows("x", x, (rows, in_features))
    require(weight.is_contiguous(), "the weight must be contiguous")
    require(x.dtype == weight.dtype, f"x is {x.dtype}, the weight {weight.dtype}")
    return launch_linear(x, weight, bias, workspace, config)


def runs_kernel_of_ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` launches its own kernel, which waits before it lets another one start."""
    return config_for(x.shape[0], weight) is not None


def allocate_workspace(rows: int, weights: Sequence[torch.Tensor]) -> Workspace:
    """What `linear` needs for up to `rows` rows and any of `weights`, or others of their shapes."""
    partials, arrivals = 0, 0
    for weight in weights:
        for block_m in ROWS:
            config = config_for(min(block_m, rows), weight)
            if config is not None and config.splits > 1:
                partials = max(partials, block_m * weight.shape[0] * config.splits)
                arrivals = max(arrivals, weight.shape[0] // config.block_n)
    return Workspace.of_size(partials, arrivals, weights[0].device)


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: Workspace,
    config: Config,
) -> torch.Tensor:
    """The kernel in one configuration; the arguments' types were checked."""
    (rows, in_features), out_features = x.shape, weight.shape[0]
    blocks, block_m = out_features // config.block_n, block_rows(rows)
    fits = out_features % config.block_n == 0 and in_features % config.block_k == 0
    require(fits, f"a weight of {tuple(weight.shape)} does not divide by {config}")
    if config.splits > 1:
        needed = block_m * out_features * config.splits
        enough = workspace.partials.numel() >= needed and workspace.arrivals.numel() >= blocks
        require(enough, f"the workspace must have {needed} partial sums, {blocks} arrivals")
    y = x.new_empty(rows, out_features)
    _linear_kernel[(blocks * config.splits,)](
        x,
        weight,
        bias,
        y,
        workspace.partials,
        workspace.arrivals,
        rows,
        config.splits,
        in_features,
        x.stride(0),
        y.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT=config.splits > 1,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap_options(x),
    )
    return y
