"""Decode attention on the tensor cores; keys and values are never in shared memory.

One warp attends to a tile of tokens for up to eight query heads that share a kv head. An
instruction costs the same for one head as for eight. Both products take their operands from the
registers into which they were loaded, 16 adjacent bytes at a time:

    scores [head, token] = queries [head, d] keys^T
        A dot product may be summed in any order, so each lane takes eight adjacent d at a time.
    sums [d, head] = values^T [d, token] weights^T
        Rows may come in any order, so row 8 e + g of each 64 is d = 8 g + e. Each lane needs the
        weights of exactly the scores that the first product leaves in it.

For heads with keys of their own `decode_general` was measured to be faster within a step; it also
serves other dtypes and head dimensions, and the interpreter.
"""

from functools import cache
from typing import Any

import torch

from granatum.kernels.attention.common import NEVER
from granatum.kernels.gluon import (
    AVAILABLE,
    gl,
    jit,
    launch_dependents,
    mma_v2,
    sync_warp,
    wait,
)

_HEAD_DIM = 128
_MAX_GROUP = 8


def serves(q: torch.Tensor, head_dim: int, group: int) -> bool:
    """Whether the kernel takes such heads."""
    fits = head_dim == _HEAD_DIM and 1 < group <= _MAX_GROUP
    return AVAILABLE and q.dtype in (torch.bfloat16, torch.float16) and fits


def options(tokens: int) -> dict[str, Any]:
    """What `decode_kernel` is compiled with for tiles of `tokens` tokens."""
    layouts = {"WEIGHTS": _weights_layout(tokens), "VALUES": _values_layout(tokens)}
    return {**layouts, "num_warps": 1}


@cache
def _weights_layout(tokens: int) -> Any:
    """Lanes and registers of scores [8, tokens]: the upper half of what an `mma` leaves."""
    registers = [[0, 1], *([0, n] for n in _powers(8, tokens))]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [8, tokens])


@cache
def _values_layout(tokens: int) -> Any:
    """Lanes and registers of values [tokens, _HEAD_DIM] as they are loaded."""
    columns = [[0, 1], [0, 2], [0, 4], *([0, n] for n in _powers(64, _HEAD_DIM))]
    registers = [*columns, [1, 0], *([n, 0] for n in _powers(8, tokens))]
    lanes = [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [tokens, _HEAD_DIM])


def _powers(first: int, end: int) -> list[int]:
    """Powers of two from `first` to below `end`."""
    return [1 << n for n in range(first.bit_length() - 1, end.bit_length() - 1)]


@jit()
def _sum_of(a, b):
    return a + b


@jit()
def _piece_of(place, r, row_lengths, row_ends, row_pieces, BLOCK_T: gl.constexpr):
    """As `decode_general._piece_of`."""
    row = gl.sum((row_ends <= place).to(gl.int32), axis=0)
    length = gl.sum(gl.where(r == row, row_lengths, 0), axis=0)
    count = gl.sum(gl.where(r == row, row_pieces, 0), axis=0)
    piece = place - gl.sum(gl.where(r == row, row_ends - row_pieces, 0), axis=0)
    past = gl.maximum(length - 1, 0)
    size = gl.cdiv(gl.cdiv(past, BLOCK_T), gl.maximum(count, 1)) * BLOCK_T
    begin = piece * size
    return row.to(gl.int64), length, count, piece, begin, gl.minimum(begin + size, past)


@jit()
def _pages(table, t, end, PAGE_TOKENS: gl.constexpr):
    """The pages of tokens t."""
    return gl.load(table + t // PAGE_TOKENS, mask=t < end, other=0)


@jit()
def _places(pages, t, page_elements, head, PAGE_TOKENS: gl.constexpr, D: gl.constexpr):
    """Elements from the layer's start to tokens t of one plane's head."""
    return pages.to(gl.int64) * page_elements + (head * PAGE_TOKENS + t % PAGE_TOKENS) * D


@jit()
def _rotated(low, high, c, s, weight, eps, d):
    """Both halves [N, D / 2] of heads, normalised if there is a weight, rotated, in float32."""
    low = low.to(gl.float32)
    high = high.to(gl.float32)
    if weight is not None:
        mean = (gl.sum(low * low, axis=1) + gl.sum(high * high, axis=1)) / (2 * low.shape[1])
        factor = gl.expand_dims(1 / gl.sqrt(mean + eps), 1)
        low *= factor * gl.load(weight + d).to(gl.float32)[None, :]
        high *= factor * gl.load(weight + low.shape[1] + d).to(gl.float32)[None, :]
    return low * c - high * s, high * c + low * s


@jit()
def _dimension(row):
    """The dimension d that stands in a row of `values^T`."""
    return row // 64 * 64 + row % 8 * 8 + row % 64 // 8


@jit()
def _scores(q_low, q_high, low, high, TOKENS: gl.constexpr, SUMS: gl.constexpr):
    """Scores [8, TOKENS] of the first eight heads, from both halves of queries and keys."""
    zeros = gl.zeros([16, TOKENS], gl.float32, SUMS)
    products = mma_v2(q_low, low, zeros) + mma_v2(q_high, high, zeros)
    lower, _ = gl.split(gl.permute(gl.reshape(products, [2, 8, TOKENS]), [1, 2, 0]))
    return lower


@jit()
def _as_tile(own, KEYS: gl.constexpr):
    """Half of one key [1, D / 2], repeated as the keys of eight tokens [D / 2, 8]."""
    own = gl.reshape(own, [own.shape[1]])
    own = gl.convert_layout(own, gl.SliceLayout(1, KEYS), assert_trivial=True)
    return own[:, None] + gl.zeros([own.shape[0], 8], own.dtype, KEYS)


@jit()
def _join(
    partials, out, count, GROUP: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    BLOCK_G: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Add up `count` partials of each of a group's heads, and write the heads' attention.

    Four partials are loaded at a time, in their order.
    """
    SUMS: gl.constexpr = gl.SliceLayout(1, PARTS)
    ROW: gl.constexpr = gl.SliceLayout(2, PARTS)
    HEAD: gl.constexpr = gl.SliceLayout(1, ROW)
    g = gl.arange(0, BLOCK_G, HEAD)
    at_row = gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
    top = gl.full([BLOCK_G], NEVER, gl.float32, HEAD)
    total = gl.full([BLOCK_G], 0.0, gl.float32, HEAD)
    summed = gl.full([BLOCK_G, D], 0.0, gl.float32, SUMS)
    for start in range(0, count, 4):
        p = start + gl.arange(0, 4, gl.SliceLayout(0, ROW))
        there = (g < GROUP)[:, None] & (p < count)[None, :]
        at = partials + g[:, None] * (D + 2) + p[None, :] * (HEADS * (D + 2))
        tops = gl.load(at, mask=there, other=NEVER, cache_modifier=".cg")
        totals = gl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg")
        sums_at = gl.expand_dims(at + 2, 2) + gl.expand_dims(at_row, 1)
        there = gl.expand_dims(there, 2)
        sums = gl.load(sums_at, mask=there, other=0.0, cache_modifier=".cg")
        new_top = gl.maximum(top, gl.max(tops, axis=1))
        kept = gl.exp2(top - new_top)
        weights = gl.where(totals > 0, gl.exp2(tops - new_top[:, None]), 0.0)
        top = new_top
        total = total * kept + gl.sum(weights * totals, axis=1)
        summed *= gl.convert_layout(kept, gl.SliceLayout(1, SUMS))[:, None]
        summed += gl.sum(sums * gl.expand_dims(weights, 2), axis=1)
    total = gl.convert_layout(total, gl.SliceLayout(1, SUMS))
    result = summed / gl.where(total > 0, total, 1.0)[:, None]
    g = gl.arange(0, BLOCK_G, gl.SliceLayout(1, SUMS))[:, None]
    place = g * D + _dimension(at_row)
    gl.store(out + place, result.to(out.dtype.element_ty), mask=g < GROUP)


@jit("rows", "pieces", "piece_tokens", "layer", "table_stride")
def decode_kernel(
    q, k, v, cos, sin, q_norm, k_norm, arena, page_table, lengths, out, partials, arrivals, turns,
    q_stride, k_stride, v_stride, out_stride, table_stride, page_elements, rows, pieces,
    piece_tokens, layer, scale, eps,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, PAGE_TOKENS: gl.constexpr, D: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_ROWS: gl.constexpr, JOINED_HEADS: gl.constexpr,
    WEIGHTS: gl.constexpr, VALUES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One block, a warp, as `decode_general.general_kernel`."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    HALF: gl.constexpr = D // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    KEYS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    HEAD: gl.constexpr = gl.SliceLayout(1, WEIGHTS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SUMS)
    JOINED: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 1, 1], [2, 1, 0])
    r = gl.arange(0, BLOCK_ROWS, gl.BlockedLayout([1], [32], [1], [0]))
    row_lengths = gl.load(lengths + r, mask=r < rows, other=0)
    row_pasts = gl.maximum(row_lengths - 1, 0)
    row_pieces = gl.minimum(gl.maximum(gl.cdiv(row_pasts, piece_tokens), 1), pieces)
    row_pieces = gl.where(r < rows, row_pieces, 0)
    row_ends = gl.associative_scan(row_pieces, 0, _sum_of)
    items = gl.sum(row_pieces, axis=0) * KV_HEADS
    many = items > gl.num_programs(0)
    keys = arena + layer.to(gl.int64) * (2 * KV_HEADS * PAGE_TOKENS * D)
    values = keys + KV_HEADS * PAGE_TOKENS * D
    half = gl.arange(0, HALF, gl.SliceLayout(0, QUERIES))
    n = gl.arange(0, 16, gl.SliceLayout(1, QUERIES))
    key_d = gl.arange(0, HALF, gl.SliceLayout(1, KEYS))[:, None]
    key_t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, KEYS))
    value_d = gl.arange(0, D, gl.SliceLayout(0, VALUES))[None, :]
    value_t = gl.arange(0, BLOCK_T, gl.SliceLayout(1, VALUES))
    weight_t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, WEIGHTS))
    head = gl.arange(0, 8, HEAD)
    column = gl.arange(0, 8, COLUMN)
    at_row = gl.arange(0, D, gl.SliceLayout(1, SUMS))
    sum_d = _dimension(at_row)
    item = gl.program_id(0)
    row, length, count, piece, begin, end = _piece_of(
        item // KV_HEADS, r, row_lengths, row_ends, row_pieces, BLOCK_T
    )
    if PDL:
        wait()
        launch_dependents()
    while item < items:
        kv_head = item % KV_HEADS
        past = gl.maximum(length - 1, 0)
        table = page_table + row * table_stride
        key_pages = _pages(table, begin + key_t, end, PAGE_TOKENS)
        value_pages = _pages(table, begin + value_t, end, PAGE_TOKENS)
        angle = past.to(gl.int64) * HALF + half
        c = gl.load(cos + angle)[None, :]
        s = gl.load(sin + angle)[None, :]
        q_at = q + row * q_stride + (kv_head * GROUP + n)[:, None] * D + half[None, :]
        real = (n < GROUP)[:, None]
        q_low = gl.load(q_at, mask=real, other=0.0)
        q_high = gl.load(q_at + HALF, mask=real, other=0.0)
        q_low, q_high = _rotated(q_low, q_high, c, s, q_norm, eps, half)
        q_low = q_low.to(q.dtype.element_ty)
        q_high = q_high.to(q.dtype.element_ty)
        top = gl.full([8], NEVER, gl.float32, HEAD)
        total = gl.full([8], 0.0, gl.float32, HEAD)
        summed = gl.zeros([D, 8], gl.float32, SUMS)
        if (piece == 0) & (length > 0):
            k_at = k + row * k_stride + kv_head * D + half
            k_low, k_high = gl.load(k_at)[None, :], gl.load(k_at + HALF)[None, :]
            v_at = v + row * v_stride + kv_head * D
            v_low, v_high = gl.load(v_at + half), gl.load(v_at + HALF + half)
            own_v = gl.load(v_at + sum_d).to(gl.float32)[:, None]
            k_low, k_high = _rotated(k_low, k_high, c, s, k_norm, eps, half)
            k_low, k_high = k_low.to(k.dtype.element_ty), k_high.to(k.dtype.element_ty)
            own = gl.load(table + past // PAGE_TOKENS).to(gl.int64) * page_elements
            own += (kv_head * PAGE_TOKENS + past % PAGE_TOKENS) * D
            gl.store(keys + own + half[None, :], k_low)
            gl.store(keys + own + HALF + half[None, :], k_high)
            gl.store(values + own + half, v_low)
            gl.store(values + own + HALF + half, v_high)
            own_low, own_high = _as_tile(k_low, KEYS), _as_tile(k_high, KEYS)
            score = gl.max(_scores(q_low, q_high, own_low, own_high, 8, SUMS), axis=1)
            top = gl.convert_layout(score, HEAD) * scale
            total = gl.full([8], 1.0, gl.float32, HEAD)
            summed += own_v
        for start in range(begin, end, BLOCK_T):
            t = start + key_t
            at = _places(key_pages, t, page_elements, kv_head, PAGE_TOKENS, D)[None, :]
            low = gl.load(keys + at + key_d, mask=(t < end)[None, :], other=0.0)
            high = gl.load(keys + at + HALF + key_d, mask=(t < end)[None, :], other=0.0)
            key_pages = _pages(table, t + BLOCK_T, end, PAGE_TOKENS)
            t = start + value_t
            at = _places(value_pages, t, page_elements, kv_head, PAGE_TOKENS, D)[:, None]
            tile = gl.load(values + at + value_d, mask=(t < end)[:, None], other=0.0)
            value_pages = _pages(table, t + BLOCK_T, end, PAGE_TOKENS)
            scores = _scores(q_low, q_high, low, high, BLOCK_T, SUMS)
            scores = gl.convert_layout(scores, WEIGHTS, assert_trivial=True) * scale
            scores = gl.where((start + weight_t < end)[None, :], scores, NEVER)
            new_top = gl.maximum(top, gl.max(scores, axis=1))
            kept = gl.exp2(top - new_top)
            weights = gl.exp2(scores - new_top[:, None])
            top = new_top
            total = total * kept + gl.sum(weights, axis=1)
            right = gl.permute(weights.to(v.dtype.element_ty), [1, 0])
            right = gl.convert_layout(right, RIGHT, assert_trivial=True)
            left = gl.permute(gl.reshape(tile, [BLOCK_T, D // 64, 8, 8]), [1, 3, 2, 0])
            left = gl.convert_layout(gl.reshape(left, [D, BLOCK_T]), LEFT, assert_trivial=True)
            summed *= gl.convert_layout(kept, COLUMN)[None, :]
            summed = mma_v2(left, right, summed)
        row_out = out + row * out_stride + kv_head * GROUP * D
        if count == 1:
            sums = gl.convert_layout(total, COLUMN)
            result = summed / gl.where(sums > 0, sums, 1.0)[None, :]
            place = column[None, :] * D + sum_d[:, None]
            result = result.to(out.dtype.element_ty)
            gl.store(row_out + place, result, mask=(column < GROUP)[None, :])
        else:
            row_partials = partials + (row * pieces * HEADS + kv_head * GROUP) * (D + 2)
            own_partial = row_partials + piece * (HEADS * (D + 2))
            gl.store(own_partial + head * (D + 2), top, mask=head < GROUP)
            gl.store(own_partial + head * (D + 2) + 1, total, mask=head < GROUP)
            place = column[None, :] * (D + 2) + 2 + at_row[:, None]
            gl.store(own_partial + place, summed, mask=(column < GROUP)[None, :])
            sync_warp()
            arrival = arrivals + row * KV_HEADS + kv_head
            if gl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == count - 1:
                gl.store(arrival, 0)
                _join(row_partials, row_out, count, GROUP, HEADS, D, JOINED_HEADS, JOINED)
        if many:
            item = gl.atomic_add(turns, 1, sem="relaxed") + gl.num_programs(0)
            row, length, count, piece, begin, end = _piece_of(
                item // KV_HEADS, r, row_lengths, row_ends, row_pieces, BLOCK_T
            )
        else:
            item = items
    if many:
        ended = gl.atomic_add(turns + 1, 1, sem="relaxed") + 1
        if ended == gl.num_programs(0):
            gl.store(turns, 0)
            gl.store(turns + 1, 0)
