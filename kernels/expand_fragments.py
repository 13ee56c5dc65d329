"""Prompts' expand on the tensor cores, neither operand nor result ever in shared memory.

Four warps multiply a tile of 64 rows with 64 columns of B, transposed: sums [column, row]. Columns
may come in any order, so row 8 e + g of the sums is column 8 g + e: B, y and what is written then
lie in the registers that the instruction means, 16 adjacent bytes of memory at a time.

The float32 intermediate is multiplied as the sum of two bfloat16. These kernels know no other
dtype; for these, and under the interpreter, `expand` has one in Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch

from granatum.kernels.gluon import AVAILABLE, gl, jit, launch_dependents, mma_v2, wait

BLOCK = 64
"""Rows, and columns, that four warps take at a time."""
RANKS = 16
"""Ranks, likewise. MANY, of a kernel: adapters may have more."""


def serves(y: torch.Tensor, out_features: Sequence[int], block_m: int) -> bool:
    """Whether the kernels take such rows and columns."""
    aligned = y.stride(0) % 8 == 0 and all(n % BLOCK == 0 for n in out_features)
    return AVAILABLE and y.dtype == torch.bfloat16 and block_m == BLOCK and aligned


def options(warps: int) -> dict[str, Any]:
    """What the kernels are to be compiled with, for four warps or eight."""
    eight = [[0, 1], [0, 2], [0, 4]]
    lanes = [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]]
    layout, shared = gl.DistributedLinearLayout, warps.bit_length() - 1
    blocks = [[8, 0], [16, 0], [32, 0]]  # of eight rows; a warp takes one, or two
    own = [*eight, [1, 0], *blocks[shared:]]
    rows = layout(own, lanes, blocks[:shared], [], [BLOCK, BLOCK])
    ranks = layout([*eight, [1, 0], [8, 0]], lanes, [[0, 0]] * shared, [], [RANKS, BLOCK])
    sums = gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])
    return {"ROWS": rows, "RANKS": ranks, "SUMS": sums, "num_warps": warps}


@jit()
def load_tile(entries, count, tile):
    """As `shrink.load_tile`."""
    used = tile < gl.load(count)
    slot = gl.load(entries + tile * 4)
    first = gl.load(entries + tile * 4 + 1)
    rows = gl.load(entries + tile * 4 + 2)
    return gl.where(used, slot, 0).to(gl.int64), first, gl.where(used, rows, 0)


@jit()
def source_rows(order, row, present):
    """As `shrink.source_rows`."""
    if order is not None:
        row = gl.load(order + row, mask=present, other=0)
    return row.to(gl.int64)


@jit()
def to_sums(tile, SUMS: gl.constexpr):
    """A tile [row, column] as sums [8 e + g, row], in float32."""
    turned = gl.permute(gl.reshape(tile.to(gl.float32), [64, 8, 8]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 64]), SUMS, assert_trivial=True)


@jit()
def to_rows(sums, ROWS: gl.constexpr):
    """Sums as the tile [row, column] that they are."""
    turned = gl.permute(gl.reshape(sums, [8, 8, 64]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 64]), ROWS, assert_trivial=True)


@jit()
def load_intermediate(
    partials, first, rows, stacked_row, done, rank, scale, chunk_stride, width,
    CHUNKS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Of a tile's rows, scaled: ranks done to done + 15 of a shrink's results, [rank, row].

    The partial sums are added in order; the result is the sum of the two bfloat16 returned.
    """
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    r = done + gl.arange(0, 16, gl.SliceLayout(1, RIGHT))[:, None]
    m = gl.arange(0, 64, gl.SliceLayout(0, RIGHT))[None, :]
    at = partials + (first + m).to(gl.int64) * width + stacked_row + r
    known = (m < rows) & (r < rank)
    total = gl.load(at, mask=known, other=0.0)
    for chunk in gl.static_range(1, CHUNKS):
        total += gl.load(at + chunk * chunk_stride, mask=known, other=0.0)
    total *= scale
    high = total.to(gl.bfloat16)
    return high, (total - high.to(gl.float32)).to(gl.bfloat16)


@jit()
def load_b(start, column, width, done, rank, RANKS: gl.constexpr, SUMS: gl.constexpr):
    """Ranks done to done + 15 of 64 columns of B as the left operand [8 e + g, rank]."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    r = done + gl.arange(0, 16, gl.SliceLayout(1, RANKS))
    n = column + gl.arange(0, 64, gl.SliceLayout(0, RANKS))
    at = start + r[:, None] * width + n[None, :]
    b = gl.load(at, mask=(r < rank)[:, None], other=0.0)
    turned = gl.permute(gl.reshape(b, [16, 8, 8]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 16]), LEFT, assert_trivial=True)


@jit()
def add_product(sums, b, high, low):
    """sums + b @ (high + low)."""
    return mma_v2(b, low, mma_v2(b, high, sums))


@jit()
def _find_slice(block, N0: gl.constexpr, N1: gl.constexpr, N2: gl.constexpr, SPAN: gl.constexpr):
    """As `expand._find_slice`."""
    blocks0: gl.constexpr = (N0 + SPAN - 1) // SPAN
    blocks1: gl.constexpr = (N1 + SPAN - 1) // SPAN
    second = block >= blocks0
    third = block >= blocks0 + blocks1
    p = second.to(gl.int32) + third.to(gl.int32)
    block -= gl.where(third, blocks0 + blocks1, gl.where(second, blocks0, 0))
    width = gl.where(third, N2, gl.where(second, N1, N0))
    start = gl.where(third, N0 + N1, gl.where(second, N0, 0))
    return p, block * SPAN, width, start


@jit()
def rank_before(ranks, p, PROJECTIONS: gl.constexpr):
    """As `expand.rank_before`."""
    rank = gl.load(ranks)
    column = 0 * rank
    for q in gl.static_range(1, PROJECTIONS):
        own = gl.load(ranks + q)
        column += gl.where(p >= q, gl.load(ranks + q - 1), 0)
        rank = gl.where(p == q, own, rank)
    return rank, column


@jit("rows_total", "workspace_width", "layers", "layer")
def expand_kernel(
    y,
    bias,
    arena,
    b_offsets,
    ranks,
    scales,
    entries,
    count,
    order,
    partials,
    y_stride,
    rows_total,
    workspace_width,
    layers,
    layer,
    PROJECTION: gl.constexpr,
    PROJECTIONS: gl.constexpr,
    N0: gl.constexpr,
    N1: gl.constexpr,
    N2: gl.constexpr,
    CHUNKS: gl.constexpr,
    MANY: gl.constexpr,
    SPAN: gl.constexpr,
    ADD: gl.constexpr,
    PDL: gl.constexpr,
    ROWS: gl.constexpr,
    RANKS: gl.constexpr,
    SUMS: gl.constexpr,
):
    """One block: SPAN columns of one projection, in steps, of every so many-th tile.

    As `expand._expand_tiles_kernel`.
    """
    p, column, width, begin = _find_slice(gl.program_id(0), N0, N1, N2, SPAN)
    m = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    n = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    chunk_stride = rows_total.to(gl.int64) * workspace_width
    for tile in range(gl.program_id(1), gl.load(count), gl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (gl.maximum(slot, 0) * layers + layer) * 7 + PROJECTION
        rank, stacked_row = rank_before(ranks + place, p, PROJECTIONS)
        rank = gl.where(slot < 0, 0, rank)
        b_start = arena + gl.multiple_of(gl.load(b_offsets + place + p), 32)
        scale = gl.load(scales + place + p)
        present = (m < rows)[:, None]
        y_rows = y + source_rows(order, first + m, m < rows)[:, None] * y_stride + begin + n
        if PDL:
            wait()
            launch_dependents()
        if (rank > 0) | (not ADD):
            high, low = load_intermediate(
                partials, first, rows, stacked_row, 0, rank, scale, chunk_stride, workspace_width,
                CHUNKS, SUMS,
            )  # fmt: skip
            for at in range(column, gl.minimum(column + SPAN, width), 64):
                if ADD:
                    tile_y = gl.load(y_rows + at, mask=present, other=0.0)
                    sums = to_sums(tile_y, SUMS)
                else:
                    sums = gl.zeros([64, 64], gl.float32, SUMS)
                b = load_b(b_start, at, width, 0, rank, RANKS, SUMS)
                sums = add_product(sums, b, high, low)
                if MANY:
                    for done in range(16, rank, 16):
                        b = load_b(b_start, at, width, done, rank, RANKS, SUMS)
                        more_high, more_low = load_intermediate(
                            partials, first, rows, stacked_row, done, rank, scale, chunk_stride,
                            workspace_width, CHUNKS, SUMS,
                        )  # fmt: skip
                        sums = add_product(sums, b, more_high, more_low)
                total = to_rows(sums, ROWS)
                if bias is not None:
                    total += gl.load(bias + begin + at + n).to(gl.float32)
                gl.store(y_rows + at, total.to(y.dtype.element_ty), mask=present)
    if PDL and gl.program_id(0) + gl.program_id(1) == 0:
        wait()  # one block that waits keeps the next kernel from overtaking
