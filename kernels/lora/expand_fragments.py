"""Prompts' expand on the tensor cores, what is multiplied where it was loaded, in registers.

Four warps multiply a tile of 64 rows with two times 64 columns of B, transposed: sums
[column, row]. Columns may come in any order, so row 8 e + g of the sums is column 8 g + e: B, y and
what is written then lie in the registers that the instruction means, 16 adjacent bytes of memory at
a time. y and B come through a ring in shared memory, copied a step ahead.

A step is a pair of 64 columns and 16 ranks. A tile's float32 intermediate is summed once for all
steps and multiplied as the sum of two bfloat16, which a block holds for all ranks that the table
allows. These kernels know no other dtype; for these, and under the interpreter, `expand` has one in
Triton. `go_through` serves the activation and the positions as well, which finish a pair otherwise.
"""

from typing import Any

import torch

from granatum.kernels.device import gpu_of
from granatum.kernels.gluon import (
    AVAILABLE,
    async_copy,
    async_load,
    gl,
    jit,
    launch_dependents,
    mma_v2,
    of_triton,
    wait,
)
from granatum.kernels.lora import lookup
from granatum.kernels.lora.tuning import Shape

BLOCK = 64
"""Rows, and columns of one of a pair, that a step takes."""
PAIR = 2 * BLOCK
RANKS = 16
"""Ranks, likewise."""
_STAGES = 2
_WARPS = 4

load_tile = of_triton(lookup.load_tile)
source_rows = of_triton(lookup.source_rows)
rank_before = of_triton(lookup.rank_before)
_find_slice = of_triton(lookup.find_slice)


def serves(y: torch.Tensor, shape: Shape, step: int, projections: int = 1) -> bool:
    """Whether the kernels take such rows, and columns in steps of so many, and have room there.

    `projections` are those whose intermediate a block holds at once.
    """
    if not AVAILABLE or y.dtype != torch.bfloat16 or shape.block_m != BLOCK:
        return False
    if y.data_ptr() % 16 or y.stride(0) % 8 or any(n % step for n in shape.out_features):
        return False
    held = _held(shape.max_rank) if shape.max_rank > RANKS else 0
    values = 2 * _STAGES * (BLOCK + RANKS) * BLOCK + 2 * projections * held * RANKS * BLOCK
    return values * y.element_size() <= gpu_of(y.device).shared_memory


def _held(max_rank: int) -> int:
    """Blocks of ranks that an adapter may have."""
    return -(-max_rank // RANKS)


def options(max_rank: int) -> dict[str, Any]:
    """What the kernels are to be compiled with. HELD: as `_held`."""
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
def make_rings(y, STAGES: gl.constexpr):
    """Room in shared memory for pairs of tiles of y, and of B."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    dtype: gl.constexpr = y.dtype.element_ty
    return (
        gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], LAYOUT),
        gl.allocate_shared_memory(dtype, [2 * STAGES, 16, 64], LAYOUT),
    )


@jit()
def copy_y(ring, stage, at, gap, present):
    """Begin to copy a pair of tiles of y, `gap` elements apart."""
    async_load(ring.index(2 * stage), at, mask=present)
    async_load(ring.index(2 * stage + 1), at + gap, mask=present)


@jit()
def copy_b(
    ring, stage, start, next_start, column, width, done, rank, next_rank, COPIED: gl.constexpr
):
    """Begin to copy a step's pair of B: ranks done to done + 15 of 64 columns, of either start."""
    r = done + gl.arange(0, 16, gl.SliceLayout(1, COPIED))
    n = column + gl.arange(0, 64, gl.SliceLayout(0, COPIED))
    at = r[:, None] * width + n[None, :]
    async_load(ring.index(2 * stage), start + at, mask=(r < rank)[:, None])
    async_load(ring.index(2 * stage + 1), next_start + at, mask=(r < next_rank)[:, None])


@jit()
def read_b(tile, RANKS: gl.constexpr, SUMS: gl.constexpr):
    """A tile of B as the left operand [8 e + g, rank]."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    turned = gl.permute(gl.reshape(tile.load(RANKS), [16, 8, 8]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 16]), LEFT, assert_trivial=True)


@jit()
def make_held(PROJECTIONS: gl.constexpr, HELD: gl.constexpr):
    """Room in shared memory for the intermediate of a tile's rows, by projection and ranks."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    return gl.allocate_shared_memory(gl.bfloat16, [2 * PROJECTIONS * HELD, 16, 64], LAYOUT)


@jit()
def load_intermediate(
    partials, first, rows, stacked_row, done, rank, scale, chunk_stride, width,
    CHUNKS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """A tile's ranks done to done + 15 [rank, row], scaled: the two bfloat16 whose sum they are.

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
def read_intermediate(held, place, SUMS: gl.constexpr):
    """What is kept at a place."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    return held.index(2 * place).load(RIGHT), held.index(2 * place + 1).load(RIGHT)


@jit()
def add_product(sums, b, high, low):
    """sums + b @ (high + low)."""
    return mma_v2(b, low, mma_v2(b, high, sums))


@jit()
def go_through(
    FINISH: gl.constexpr, finished, y_rows, gap, present, room, source, left_side, right_side,
    column, columns, width,
    STEP: gl.constexpr, ADD: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr,
    RANKS: gl.constexpr, COPIED: gl.constexpr, SUMS: gl.constexpr, HELD: gl.constexpr,
    STAGES: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """Expand a tile's `columns` from `column` on, a pair of 64 and STEP in all at a step.

    room: the rings, and what is held of the intermediate. source: the shrink's partials, the tile's
    first row and rows, and the elements from a chunk to the next, and from a row.
    A pair is a left and a right tile: of y, `gap` apart, and of B. A side is where B starts, its
    first row in the stacked A, its rank and scale; if right_side is None, B's is 64 columns further
    and the rest the left's. ADD: the sums begin as y, not as zeros. MANY: of more than 16 ranks.
    FINISH(finished, turn, at, left, right, ROWS) takes the sums of the turn-th pair, at a column.
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
            copy_y(y_ring, step, y_rows + at, gap, present & live & (done == 0))
        copy_b(
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
            copy_y(y_ring, ahead % STAGES, y_rows + next_at, gap, next_y)
        copy_b(
            b_ring, ahead % STAGES, start, next_start, next_at, width, next_done,
            gl.where(live, rank, 0), gl.where(live, next_rank, 0), COPIED,
        )  # fmt: skip
        async_copy.commit_group()
        if done == 0:
            if ADD:
                left = to_sums(y_ring.index(2 * stage).load(ROWS), SUMS)
                right = to_sums(y_ring.index(2 * stage + 1).load(ROWS), SUMS)
            else:
                left = gl.zeros([64, 64], gl.float32, SUMS)
                right = left
        b = read_b(b_ring.index(2 * stage), RANKS, SUMS)
        if MANY:
            high, low = read_intermediate(held, done // 16, SUMS)
            next_high, next_low = high, low
        left = add_product(left, b, high, low)
        b = read_b(b_ring.index(2 * stage + 1), RANKS, SUMS)
        if MANY and right_side is not None:
            next_high, next_low = read_intermediate(held, HELD + done // 16, SUMS)
        right = add_product(right, b, next_high, next_low)
        if done + 16 >= blocks * 16:
            FINISH(finished, turn, at, left, right, ROWS)
    async_copy.wait_group(0)


@jit()
def _store(finished, _turn, at, left, right, ROWS: gl.constexpr):
    """Add the bias, if any, and write the pair."""
    y_rows, present, bias = finished
    dtype: gl.constexpr = y_rows.dtype.element_ty
    n = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    left_y, right_y = to_rows(left, ROWS), to_rows(right, ROWS)
    if bias is not None:
        left_y += gl.load(bias + at + n).to(gl.float32)
        right_y += gl.load(bias + at + 64 + n).to(gl.float32)
    gl.store(y_rows + at, left_y.to(dtype), mask=present)
    gl.store(y_rows + at + 64, right_y.to(dtype), mask=present)


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
    SPAN: gl.constexpr,
    ADD: gl.constexpr,
    PDL: gl.constexpr,
    ROWS: gl.constexpr,
    RANKS: gl.constexpr,
    COPIED: gl.constexpr,
    SUMS: gl.constexpr,
    HELD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One block: SPAN columns of one projection, in steps, of every so many-th tile.

    As `expand._expand_tiles_kernel`.
    """
    p, column, width, begin = _find_slice(gl.program_id(0), N0, N1, N2, SPAN)
    m = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    n = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    chunk_stride = rows_total.to(gl.int64) * workspace_width
    y_ring, b_ring = make_rings(y, STAGES)
    held = make_held(1, HELD)
    if bias is not None:
        bias += begin
    for tile in range(gl.program_id(1), gl.load(count), gl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (gl.maximum(slot, 0) * layers + layer) * 7 + PROJECTION
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
