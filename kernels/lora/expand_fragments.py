"""Prompts' expand on the tensor cores: operands are multiplied in the registers they came to.

A step takes a pair of 64 columns and 16 ranks (`fragments.py` draws the tiles). A tile's float32
intermediate is summed once for all steps and multiplied as the sum of two bfloat16; a block holds
it for all ranks that the table allows. These kernels know no other dtype; `expand_tiles` has a
kernel in Triton for other dtypes and for the interpreter. The activation and the rotation share
`go_through` and finish a pair in their own way.
"""

from typing import Any

import torch

from granatum.kernels.device import gpu_of
from granatum.kernels.gluon import (
    AVAILABLE,
    async_copy,
    gl,
    jit,
    launch_dependents,
    of_triton,
    wait,
)
from granatum.kernels.lora import fragments, lookup
from granatum.kernels.lora.tuning import Shape

BLOCK = 64
"""Rows of a tile, and columns of each half of a pair."""
PAIR = 2 * BLOCK
RANKS = 16
"""Ranks of a step."""
_STAGES = 2
_WARPS = 4

load_tile = of_triton(lookup.load_tile)
source_rows = of_triton(lookup.source_rows)
rank_before = of_triton(lookup.rank_before)
_find_slice = of_triton(lookup.find_slice)


def serves(y: torch.Tensor, shape: Shape, step: int, projections: int = 1) -> bool:
    """Whether the kernels take y's rows in steps of `step` columns, and have shared memory for it.

    A block holds the intermediate of `projections` projections at once.
    """
    if not AVAILABLE or y.dtype != torch.bfloat16 or shape.block_m != BLOCK:
        return False
    if y.data_ptr() % 16 or y.stride(0) % 8 or any(n % step for n in shape.out_features):
        return False
    held = _held(shape.max_rank) if shape.max_rank > RANKS else 0
    values = 2 * _STAGES * (BLOCK + RANKS) * BLOCK + 2 * projections * held * RANKS * BLOCK
    return values * y.element_size() <= gpu_of(y.device).shared_memory


def _held(max_rank: int) -> int:
    """Blocks of RANKS ranks that the largest adapter needs."""
    return -(-max_rank // RANKS)


def options(max_rank: int) -> dict[str, Any]:
    """What the kernels are compiled with: layouts, and room for HELD blocks of ranks."""
    eight = [[0, 1], [0, 2], [0, 4]]
    lanes = [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]]
    layout = gl.DistributedLinearLayout
    rows = layout([*eight, [1, 0], [32, 0]], lanes, [[8, 0], [16, 0]], [], [BLOCK, BLOCK])
    ranks = layout([*eight, [1, 0], [8, 0]], lanes, [[0, 0], [0, 0]], [], [RANKS, BLOCK])
    copied = gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])
    sums = gl.NVMMADistributedLayout([2, 0], [1, _WARPS], [16, 8])
    layouts = {"ROWS": rows, "RANKS": ranks, "COPIED": copied, "SUMS": sums}
    return {**layouts, "HELD": _held(max_rank), "STAGES": _STAGES, "num_warps": _WARPS}


@jit()
def load_intermediate(
    partials, first, rows, stacked_row, done, rank, scale, chunk_stride, width,
    CHUNKS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """A tile's scaled intermediate [rank, row] of ranks done to done + 15, as two bfloat16.

    The shrink's partial sums are added in order.
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
def hold_intermediate(
    held, place, blocks, partials, first, rows, stacked_row, rank, scale, chunk_stride, width,
    CHUNKS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Keep a tile's intermediate of all ranks, 16 at a place."""
    for block in range(blocks):
        high, low = load_intermediate(
            partials, first, rows, stacked_row, 16 * block, rank, scale, chunk_stride, width,
            CHUNKS, SUMS,
        )  # fmt: skip
        held.index(2 * (place + block)).store(high)
        held.index(2 * (place + block) + 1).store(low)


@jit()
def go_through(
    FINISH: gl.constexpr, finished, y_rows, gap, present, room, source, left_side, right_side,
    column, columns, width,
    STEP: gl.constexpr, ADD: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr,
    RANKS: gl.constexpr, COPIED: gl.constexpr, SUMS: gl.constexpr, HELD: gl.constexpr,
    STAGES: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """Expand a tile's `columns` columns from `column` on; a step takes a pair, STEP columns apart.

    room:   the rings, and the room for the intermediate.
    source: the shrink's partials, the tile's first row and its rows, and the elements from one
            chunk to the next and from one row to the next.
    A pair is a left and a right half: two tiles of y, `gap` apart, and two of B. A side says where
    B starts, its first row in the stacked A, its rank and its scale. Without `right_side`, the
    right half's B begins 64 columns after the left's; row, rank and scale are the left's.
    ADD:    the sums begin as y, not as zeros.
    MANY:   the adapter has more than 16 ranks.
    FINISH(finished, turn, at, left, right, ROWS) takes the turn-th pair's sums, from column `at`.
    """
    y_ring, b_ring, held = room
    partials, first, rows, chunk_stride, workspace_width = source
    start, stacked_row, rank, scale = left_side
    if right_side is None:
        next_start, next_rank, most = start + 64, rank, rank
    else:
        next_start, next_row, next_rank, next_scale = right_side
        most = gl.maximum(rank, next_rank)
    blocks = gl.cdiv(most, 16) if MANY else 1
    steps = gl.cdiv(columns, STEP) * blocks
    for step in gl.static_range(STAGES - 1):
        at, done = column + step // blocks * STEP, step % blocks * 16
        live = step < steps
        if ADD:
            fragments.copy_y(y_ring, step, y_rows + at, gap, present & live & (done == 0))
        fragments.copy_b(
            b_ring, step, start, next_start, at, width, done, gl.where(live, rank, 0),
            gl.where(live, next_rank, 0), COPIED,
        )  # fmt: skip
        async_copy.commit_group()
    if MANY:
        hold_intermediate(
            held, 0, blocks, partials, first, rows, stacked_row, rank, scale, chunk_stride,
            workspace_width, CHUNKS, SUMS,
        )  # fmt: skip
        if right_side is not None:
            hold_intermediate(
                held, HELD, blocks, partials, first, rows, next_row, next_rank, next_scale,
                chunk_stride, workspace_width, CHUNKS, SUMS,
            )  # fmt: skip
    else:
        high, low = load_intermediate(
            partials, first, rows, stacked_row, 0, rank, scale, chunk_stride, workspace_width,
            CHUNKS, SUMS,
        )  # fmt: skip
        next_high, next_low = high, low
        if right_side is not None:
            next_high, next_low = load_intermediate(
                partials, first, rows, next_row, 0, next_rank, next_scale, chunk_stride,
                workspace_width, CHUNKS, SUMS,
            )  # fmt: skip
    left = gl.zeros([64, 64], gl.float32, SUMS)
    right = left
    for step in range(steps):
        stage = step % STAGES
        turn = step // blocks
        at, done = column + turn * STEP, step % blocks * 16
        async_copy.wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        next_at, next_done = column + ahead // blocks * STEP, ahead % blocks * 16
        live = ahead < steps
        if ADD:
            next_y = present & live & (next_done == 0)
            fragments.copy_y(y_ring, ahead % STAGES, y_rows + next_at, gap, next_y)
        fragments.copy_b(
            b_ring, ahead % STAGES, start, next_start, next_at, width, next_done,
            gl.where(live, rank, 0), gl.where(live, next_rank, 0), COPIED,
        )  # fmt: skip
        async_copy.commit_group()
        if done == 0:
            if ADD:
                left = fragments.to_sums(y_ring.index(2 * stage).load(ROWS), SUMS)
                right = fragments.to_sums(y_ring.index(2 * stage + 1).load(ROWS), SUMS)
            else:
                left = gl.zeros([64, 64], gl.float32, SUMS)
                right = left
        b = fragments.read_b(b_ring.index(2 * stage), RANKS, SUMS)
        if MANY:
            high, low = fragments.read_intermediate(held, done // 16, SUMS)
            next_high, next_low = high, low
        left = fragments.add_product(left, b, high, low)
        b = fragments.read_b(b_ring.index(2 * stage + 1), RANKS, SUMS)
        if MANY and right_side is not None:
            next_high, next_low = fragments.read_intermediate(held, HELD + done // 16, SUMS)
        right = fragments.add_product(right, b, next_high, next_low)
        if done + 16 >= blocks * 16:
            FINISH(finished, turn, at, left, right, ROWS)
    async_copy.wait_group(0)


@jit()
def _store(finished, _turn, at, left, right, ROWS: gl.constexpr):
    """Add the bias, if any, and write the pair."""
    y_rows, present, bias = finished
    dtype: gl.constexpr = y_rows.dtype.element_ty
    n = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    left_y, right_y = fragments.to_rows(left, ROWS), fragments.to_rows(right, ROWS)
    if bias is not None:
        left_y += gl.load(bias + at + n).to(gl.float32)
        right_y += gl.load(bias + at + 64 + n).to(gl.float32)
    gl.store(y_rows + at, left_y.to(dtype), mask=present)
    gl.store(y_rows + at + 64, right_y.to(dtype), mask=present)


@jit("rows_total", "workspace_width", "layers", "layer")
def expand_kernel(
    y, bias, arena, b_offsets, ranks, scales, entries, count, order, partials,
    y_stride, rows_total, workspace_width, layers, layer,
    PROJECTION: gl.constexpr, PROJECTIONS: gl.constexpr, LAYER_PROJECTIONS: gl.constexpr,
    N0: gl.constexpr, N1: gl.constexpr, N2: gl.constexpr, CHUNKS: gl.constexpr,
    SPAN: gl.constexpr, ADD: gl.constexpr, PDL: gl.constexpr, ROWS: gl.constexpr,
    RANKS: gl.constexpr, COPIED: gl.constexpr, SUMS: gl.constexpr, HELD: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One block: SPAN columns of one projection, in steps, of every num_programs(1)-th tile.

    As `expand_tiles.expand_tiles_kernel`.
    """
    p, column, width, begin = _find_slice(gl.program_id(0), N0, N1, N2, SPAN)
    m = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    n = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    chunk_stride = rows_total.to(gl.int64) * workspace_width
    y_ring, b_ring = fragments.make_rings(y, STAGES)
    held = fragments.make_held(1, HELD)
    if bias is not None:
        bias += begin
    for tile in range(gl.program_id(1), gl.load(count), gl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (gl.maximum(slot, 0) * layers + layer) * LAYER_PROJECTIONS + PROJECTION
        rank, stacked_row = rank_before(ranks + place, p, PROJECTIONS)
        rank = gl.where(slot < 0, 0, rank)
        start = arena + gl.multiple_of(gl.load(b_offsets + place + p), 32)
        scale = gl.load(scales + place + p)
        present = (m < rows)[:, None]
        y_rows = y + source_rows(order, first + m, m < rows)[:, None] * y_stride + begin + n
        if PDL:
            wait()
            launch_dependents()
        finished, room = (y_rows, present, bias), (y_ring, b_ring, held)
        source = (partials, first, rows, chunk_stride, workspace_width)
        side = (start, stacked_row, rank, scale)
        columns = gl.minimum(SPAN, width - column)
        if (rank <= 16) & ((rank > 0) | (not ADD)):
            go_through(
                _store, finished, y_rows, 64, present, room, source, side, None, column, columns,
                width, 128, ADD, CHUNKS, ROWS, RANKS, COPIED, SUMS, HELD, STAGES, False,
            )  # fmt: skip
        if HELD > 1 and rank > 16:
            go_through(
                _store, finished, y_rows, 64, present, room, source, side, None, column, columns,
                width, 128, ADD, CHUNKS, ROWS, RANKS, COPIED, SUMS, HELD, STAGES, True,
            )  # fmt: skip
    if PDL and gl.program_id(0) + gl.program_id(1) == 0:
        wait()  # one block that waits keeps the next kernel from overtaking
