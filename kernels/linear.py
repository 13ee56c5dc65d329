"""A linear layer of few rows, as decoding has them: bound by the bytes of its weight.

    y = x W^T + b        x [M, K], W [N, K], M up to `MAX_ROWS`, float32 sums

A block streams its rows of W through shared memory. It asks for the first of them before it waits
for the kernel that makes x, so that the memory is busy across launches. Where N has too few rows
of blocks for the GPU, blocks share K: each writes a partial sum, and the last to arrive adds all of
them in order. A row's result depends on shapes alone, not on the other rows.

`h200_linear.json`, written by `benchmarks/linear_tune.py`, says how a shape is cut. Shapes that it
lacks, or where the library was faster, go to torch.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from granatum.kernels.backend import (
    dot,
    jit,
    overlap_options,
    require,
    require_rows,
    runs_kernel,
    tl,
)

MAX_ROWS = 64
"""From here on arithmetic counts as well, and the library serves."""
_LEAST_ROWS = 16
"""The tensor cores' least."""
_PIECES = tl.constexpr(8)
"""Prefetches of a row of W, so that every thread of a block has one."""
_TABLES = {"H200": "h200_linear.json"}


@dataclass(frozen=True, slots=True)
class Config:
    """How a linear is cut into blocks.

    block_n, block_k: rows and columns of W in a tile;
    splits:           blocks that share K;
    turned:           whether W is the left operand of the tensor cores;
    ahead:            columns of each row of W, a multiple of 64, that a block asks for early.
    """

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    turned: bool
    ahead: int


@dataclass(frozen=True, slots=True)
class Workspace:
    """Partial sums, float32, and arrivals per block of N, int32, zero between launches."""

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, out_features: int, device: torch.device) -> "Workspace":
        """For linears of up to `rows` rows whose splits have `out_features` columns in all."""
        elements = block_rows(min(rows, MAX_ROWS)) * out_features
        return cls(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.zeros(out_features // 8, dtype=torch.int32, device=device),
        )


@jit("ahead")
def _ask_for(rows, ahead, BLOCK_N: tl.constexpr):
    """Bring the first `ahead` columns of rows of W, in 16 bits, to the L2 cache."""
    piece = (ahead // _PIECES).to(tl.int32)
    at = rows[:, None] + tl.arange(0, _PIECES)[None, :] * piece
    size = tl.zeros((BLOCK_N, _PIECES), tl.int32) + 2 * piece
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [at.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit("rows", "splits", "ahead")
def _linear_kernel(
    x, weight, bias, y, partials, arrivals, rows, splits, ahead, K, x_stride, y_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    TURNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_N columns of y, of one of the splits of K."""
    pid = tl.program_id(0)
    block = pid // splits
    split = pid % splits
    steps = K // BLOCK_K
    begin = split * steps // splits
    end = (split + 1) * steps // splits
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if ahead > 0:
            most = tl.minimum(ahead, (end - begin) * BLOCK_K)
            _ask_for(weight + n * K + begin * BLOCK_K, most, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    if TURNED:
        turned = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for step in range(begin, end):
            columns = step * BLOCK_K + k
            ws = tl.load(weight + n[:, None] * K + columns[None, :])
            x_at = x + m[None, :] * x_stride + columns[:, None]
            turned = dot(ws, tl.load(x_at, mask=(m < rows)[None, :], other=0.0), turned)
        total = tl.trans(turned)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(begin, end):
            columns = step * BLOCK_K + k
            ws = tl.load(weight + n[None, :] * K + columns[:, None])
            x_at = x + m[:, None] * x_stride + columns[None, :]
            total = dot(tl.load(x_at, mask=(m < rows)[:, None], other=0.0), ws, total)
    real = (m < rows)[:, None] & (n >= 0)[None, :]
    last = True
    if SPLIT:
        tile = m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        own = partials + block * splits * (BLOCK_M * BLOCK_N) + tile
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
    config = config_for(rows, weight) if runs_kernel(x) else None
    if config is None:
        return functional.linear(x, weight, bias)
    require_rows("x", x, (rows, in_features))
    require(weight.is_contiguous(), "the weight must be contiguous")
    require(x.dtype == weight.dtype, f"x is {x.dtype}, the weight {weight.dtype}")
    return launch_linear(x, weight, bias, workspace, config)


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
        config.ahead,
        in_features,
        x.stride(0),
        y.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT=config.splits > 1,
        TURNED=config.turned,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap_options(x),
    )
    return y


def block_rows(rows: int) -> int:
    """Rows of x, and some of padding, that a block takes."""
    return max(_LEAST_ROWS, 1 << (rows - 1).bit_length())


def config_for(rows: int, weight: torch.Tensor) -> Config | None:
    """How `rows` rows meet `weight`, where that was measured to be faster than the library."""
    if rows > MAX_ROWS or not weight.is_cuda or weight.dtype.itemsize != 2:
        return None
    out_features, in_features = weight.shape
    return _measured(weight.get_device(), shape_key(in_features, out_features, rows))


def shape_key(in_features: int, out_features: int, rows: int) -> str:
    """A shape's name in a measured table."""
    return f"{in_features}->{out_features} by {block_rows(rows)}"


@cache
def _measured(device_index: int, key: str) -> Config | None:
    gpu = torch.cuda.get_device_name(device_index)
    name = next((table for name, table in _TABLES.items() if name in gpu), None)
    found = _table(name).get(key) if name else None
    return Config(**found) if found else None


@cache
def _table(name: str) -> dict[str, dict[str, Any] | None]:
    text = Path(__file__).with_name(name).read_text()
    configs: dict[str, dict[str, Any] | None] = json.loads(text)["configs"]
    return configs
