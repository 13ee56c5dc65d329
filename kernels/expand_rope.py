"""SGMV-expand of prompts' q, k and v within the positions: it never travels through y."""

from math import gcd

import torch

from granatum.kernels import reference_lora as reference
from granatum.kernels.backend import jit, require, runs_kernel, tl, triton
from granatum.kernels.expand import (
    check_expand,
    dot_expanded,
    fitting_span,
    rank_before,
    sum_chunks,
)
from granatum.kernels.layout import FIRST_PROJECTION, GROUPS, AdapterTable, KvLayout, Tiles
from granatum.kernels.rope import Rotary
from granatum.kernels.shrink import load_tile, source_rows, tile_programs
from granatum.kernels.tuning import power_of_two

QKV = GROUPS.index("qkv")
_BLOCK_HEADS = 8
"""That a block goes through at most."""


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_rope_kernel(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    kv_arena,
    kv_slots,
    arena,
    b_offsets,
    ranks,
    scales,
    entries,
    count,
    order,
    partials,
    y_stride,
    page_elements,
    rows_total,
    workspace_width,
    layers,
    layer,
    eps,
    PROJECTION: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: some heads of q, k or v, in turn, of every so many-th tile.

    A head's lower and upper half, BLOCK_D wide, are expanded apart: they rotate into each other.
    """
    head = tl.program_id(0) * BLOCK_HEADS
    p = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
    before = tl.where(p == 0, 0, tl.where(p == 1, HEADS, HEADS + KV_HEADS))
    width = tl.where(p == 0, HEADS * D, KV_HEADS * D)
    rotary_width = tl.where(p < 2, D // 2, 0)  # v is not rotated
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    chunk_stride = rows_total.to(tl.int64) * workspace_width
    for tile in range(tl.program_id(1), tl.load(count), tl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (tl.maximum(slot, 0) * layers + layer) * 7 + PROJECTION
        rank, stacked_row = rank_before(ranks + place, p, 3)
        rank = tl.where(slot < 0, 0, rank)
        b_start = arena + tl.multiple_of(tl.load(b_offsets + place + p), 32)
        scale = tl.load(scales + place + p)
        row = source_rows(order, first + m, m < rows)[:, None]
        kv_slot = tl.load(kv_slots + row, mask=(m < rows)[:, None], other=-1).to(tl.int64)
        present = kv_slot >= 0
        position = tl.load(positions + row, mask=present, other=0).to(tl.int64)
        half = (d < D // 2)[None, :]
        turned = present & (d < rotary_width)[None, :]
        c = tl.load(cos + position * (D // 2) + d[None, :], mask=turned, other=1.0)
        s = tl.load(sin + position * (D // 2) + d[None, :], mask=turned, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        v_at = partials + (first + m).to(tl.int64)[:, None] * workspace_width + stacked_row
        v_at += r[None, :]
        known = (m < rows)[:, None] & (r < rank)[None, :]
        v = scale * sum_chunks(v_at, known, chunk_stride, CHUNKS)
        kept = present & half
        for own in range(head - before, head - before + BLOCK_HEADS):
            at = qkv + row * y_stride + (before + own) * D + d[None, :]
            low = tl.load(at, mask=kept, other=0.0).to(tl.float32)
            high = tl.load(at + D // 2, mask=kept, other=0.0).to(tl.float32)
            b_at = b_start + r[:, None] * width + own * D + d[None, :]
            inside = (r < rank)[:, None] & half
            low = dot_expanded(v, tl.load(b_at, mask=inside, other=0.0), low)
            high = dot_expanded(v, tl.load(b_at + D // 2, mask=inside, other=0.0), high)
            for done in range(BLOCK_R, rank, BLOCK_R):
                left = done + r
                known = (m < rows)[:, None] & (left < rank)[None, :]
                more = scale * sum_chunks(v_at + done, known, chunk_stride, CHUNKS)
                b_at = b_start + left[:, None] * width + own * D + d[None, :]
                inside = (left < rank)[:, None] & half
                low = dot_expanded(more, tl.load(b_at, mask=inside, other=0.0), low)
                high = dot_expanded(more, tl.load(b_at + D // 2, mask=inside, other=0.0), high)
            if q_norm is not None:
                square = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
                normed = tl.where(p < 2, tl.rsqrt(square / D + eps), 1.0)[:, None]
                weight = tl.where(p == 0, q_norm, k_norm) + d
                rotates = d < rotary_width
                low_weight = tl.load(weight, mask=rotates, other=1.0).to(tl.float32)
                high_weight = tl.load(weight + D // 2, mask=rotates, other=1.0).to(tl.float32)
                low *= normed * low_weight[None, :]
                high *= normed * high_weight[None, :]
            to = at
            if p > 0:
                plane = ((layer * 2 + p - 1) * KV_HEADS + own) * PAGE_TOKENS
                place_in_page = (plane + kv_slot % PAGE_TOKENS) * D + d[None, :]
                to = kv_arena + kv_slot // PAGE_TOKENS * page_elements + place_in_page
            tl.debug_barrier()  # an element may be read by more threads than one
            tl.store(to, low * c - high * s, mask=kept)
            tl.store(to + D // 2, high * c + low * s, mask=kept)
    if PDL and tl.program_id(0) + tl.program_id(1) == 0:
        tl.extra.cuda.gdc_wait()  # one block that waits keeps the next kernel from overtaking


def expand_rope_and_write_kv(
    qkv: torch.Tensor,
    in_features: int,
    positions: torch.Tensor,
    rotary: Rotary,
    kv: KvLayout,
    kv_slots: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """What tiles' adapters add to q, k and v, then `rope.rope_and_write_kv`, rounded once.

    After a `shrink` of the group. qkv [T, (heads + 2 kv_heads) * head_dim]: q is rotated in place,
    k and v stay as they are. arena: of the adapters and of the pages. Rows in no tile, or of a
    negative kv_slot, are left alone. For tiles long enough for the tensor cores; the rest as in
    `expand.expand` and `rope.rope_and_write_kv`.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    rows, d = qkv.shape[0], kv.head_dim
    heads = qkv.shape[1] // d - 2 * kv.kv_heads
    outs = (heads * d, kv.kv_heads * d, kv.kv_heads * d)
    place = (table, QKV, outs, tiles, workspace)
    shape, config = check_expand(qkv, in_features, *place)
    require(shape.dot, f"tiles of {tiles.block_m} rows are too short")
    rotary.require(d)
    require(positions.shape == kv_slots.shape == (rows,), "positions and kv_slots must be [T]")
    if not runs_kernel(qkv):
        reference.expand_rope_and_write_kv(
            qkv, in_features, positions, rotary, kv, kv_slots, arena, table, layer, tiles, workspace
        )
        return
    across, most = tile_programs(tiles, rows), gcd(heads, kv.kv_heads, _BLOCK_HEADS)
    block_heads = fitting_span(most, 1, (heads + 2 * kv.kv_heads,), across)
    _expand_rope_kernel[((heads + 2 * kv.kv_heads) // block_heads, across)](
        qkv,
        positions,
        rotary.cos,
        rotary.sin,
        rotary.q_norm,
        rotary.k_norm,
        arena,
        kv_slots,
        arena,
        table.b,
        table.rank,
        table.scale,
        tiles.entries,
        tiles.count,
        tiles.order,
        workspace,
        qkv.stride(0),
        kv.page_elements,
        rows,
        3 * shape.max_rank,
        table.layers,
        layer,
        rotary.eps,
        PROJECTION=FIRST_PROJECTION[QKV],
        HEADS=heads,
        KV_HEADS=kv.kv_heads,
        D=d,
        BLOCK_HEADS=block_heads,
        PAGE_TOKENS=kv.page_tokens,
        CHUNKS=config.chunks(shape),
        BLOCK_M=power_of_two(shape.block_m),
        BLOCK_D=triton.next_power_of_2(d // 2),
        BLOCK_R=config.expand_r,
        PDL=config.pdl,
        num_warps=config.expand_warps,
        num_stages=1,
        **config.launch_options,
    )
