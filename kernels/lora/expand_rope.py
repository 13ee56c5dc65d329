"""SGMV-expand of prompts' q, k and v within the rotation: what adapters add skips memory."""

from math import gcd

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.backend import runs_kernel
from granatum.kernels.device import gpu_of
from granatum.kernels.gluon import gl, jit, launch_dependents, wait
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces
from granatum.kernels.lora import expand_fragments, fragments
from granatum.kernels.lora.cut import (
    cut_expand,
    expand_arguments,
    fewest_blocks,
    fitting_span,
    tile_programs,
)

_BLOCK_HEADS = 8
"""The most heads that a block goes through."""


@jit()
def _store_rotated(finished, turn, _at, low, high, ROWS: gl.constexpr):
    """Norm a head's two halves, if there is a norm, rotate them and write them."""
    out_rows, head, head_stride, present, c, s, p, norms = finished
    q_norm, k_norm, sum_d, eps = norms
    dtype: gl.constexpr = out_rows.dtype.element_ty
    if q_norm is not None:
        square = gl.sum(low * low, axis=0) + gl.sum(high * high, axis=0)
        factor = gl.where(p < 2, 1 / gl.sqrt(square / 128 + eps), 1.0)[None, :]
        weight = gl.where(p == 0, q_norm, k_norm) + sum_d
        rotates = (sum_d >= 0) & (p < 2)
        low_weight = gl.load(weight, mask=rotates, other=1.0).to(gl.float32)
        high_weight = gl.load(weight + 64, mask=rotates, other=1.0).to(gl.float32)
        low *= factor * low_weight[:, None]
        high *= factor * high_weight[:, None]
    out_at = out_rows + (head + turn) * head_stride
    new_low = (low * c - high * s).to(dtype)
    gl.store(out_at, fragments.to_rows(new_low, ROWS), mask=present)
    new_high = (high * c + low * s).to(dtype)
    gl.store(out_at + 64, fragments.to_rows(new_high, ROWS), mask=present)


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_rope_kernel(
    qkv, positions, cos, sin, q_norm, k_norm, kv_slots,
    arena, b_offsets, ranks, scales, entries, count, order, partials,
    y_stride, page_elements, rows_total, workspace_width, layers, layer, eps,
    PROJECTION: gl.constexpr, LAYER_PROJECTIONS: gl.constexpr, HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr, BLOCK_HEADS: gl.constexpr, PAGE_TOKENS: gl.constexpr,
    CHUNKS: gl.constexpr, PDL: gl.constexpr, ROWS: gl.constexpr, RANKS: gl.constexpr,
    COPIED: gl.constexpr, SUMS: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One block: BLOCK_HEADS heads of q, k or v in turn, of every num_programs(1)-th tile."""
    head = gl.program_id(0) * BLOCK_HEADS
    p = (head >= HEADS).to(gl.int32) + (head >= HEADS + KV_HEADS).to(gl.int32)
    before = gl.where(p == 0, 0, gl.where(p == 1, HEADS, HEADS + KV_HEADS))
    width = gl.where(p == 0, HEADS, KV_HEADS) * 128
    m = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    d = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    at_row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    sum_d = at_row % 8 * 8 + at_row // 8
    y_ring, b_ring = fragments.make_rings(qkv, STAGES)
    held = fragments.make_held(1, HELD)
    chunk_stride = rows_total.to(gl.int64) * workspace_width
    for tile in range(gl.program_id(1), gl.load(count), gl.num_programs(1)):
        slot, first, rows = expand_fragments.load_tile(entries, count, tile)
        place = (gl.maximum(slot, 0) * layers + layer) * LAYER_PROJECTIONS + PROJECTION
        rank, stacked_row = expand_fragments.rank_before(ranks + place, p, 3)
        rank = gl.where(slot < 0, 0, rank)
        start = arena + gl.multiple_of(gl.load(b_offsets + place + p), 32)
        scale = gl.load(scales + place + p)
        row = expand_fragments.source_rows(order, first + m, m < rows)
        kv_slot = gl.load(kv_slots + row, mask=m < rows, other=-1).to(gl.int64)
        position = gl.load(positions + row, mask=kv_slot >= 0, other=0).to(gl.int64)
        present = (kv_slot >= 0)[:, None]
        turned = present & (p < 2)
        angle = position[:, None] * 64 + d
        c = fragments.to_sums(gl.load(cos + angle, mask=turned, other=1.0), SUMS)
        s = fragments.to_sums(gl.load(sin + angle, mask=turned, other=0.0), SUMS)
        y_rows = qkv + row[:, None] * y_stride + before * 128 + d
        plane = (layer * 2 + gl.maximum(p - 1, 0)) * (KV_HEADS * PAGE_TOKENS)
        in_page = (plane + kv_slot % PAGE_TOKENS) * 128
        kv_rows = arena + (kv_slot // PAGE_TOKENS * page_elements + in_page)[:, None] + d
        out_rows = gl.where(p == 0, y_rows, kv_rows)
        head_stride = gl.where(p == 0, 128, PAGE_TOKENS * 128)
        if PDL:
            wait()
            launch_dependents()
        own_head = head - before
        room = (y_ring, b_ring, held)
        norms = (q_norm, k_norm, sum_d, eps)
        finished = (out_rows, own_head, head_stride, present, c, s, p, norms)
        source = (partials, first, rows, chunk_stride, workspace_width)
        side = (start, stacked_row, rank, scale)
        if rank <= 16:
            expand_fragments.go_through(
                _store_rotated, finished, y_rows, 64, present, room, source, side, None,
                own_head * 128, BLOCK_HEADS * 128, width, 128, True, CHUNKS, ROWS, RANKS, COPIED,
                SUMS, HELD, STAGES, False,
            )  # fmt: skip
        if HELD > 1 and rank > 16:
            expand_fragments.go_through(
                _store_rotated, finished, y_rows, 64, present, room, source, side, None,
                own_head * 128, BLOCK_HEADS * 128, width, 128, True, CHUNKS, ROWS, RANKS, COPIED,
                SUMS, HELD, STAGES, True,
            )  # fmt: skip
    if PDL and gl.program_id(0) + gl.program_id(1) == 0:
        wait()  # one block that waits keeps the next kernel from overtaking


def expand_rope_and_write_kv(
    qkv: torch.Tensor,
    rotary: Rotary,
    kv: LayerKv,
    places: RowPlaces,
    adapters: GroupAdapters,
    rows: LoraRows,
) -> bool:
    """Add what tiles' adapters add to q, k and v, then do `rope.rope_and_write_kv` of tiles' rows.

    After a `shrink` of the group, and with its arguments checked. qkv [T, (heads + 2 kv_heads) *
    head_dim]: q is rotated in place, k and v may change. Tiles must hold all rows that have a place
    in the arena. In other rows only what adapters add may be written.

    Returns:
        Whether the kernel takes such heads; if not, nothing was done.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    shape, config = cut_expand(qkv, adapters, rows)
    layout = kv.layout
    served = layout.head_dim == expand_fragments.PAIR and layout.page_elements % 8 == 0
    served &= expand_fragments.serves(qkv, shape, expand_fragments.PAIR)
    if not (served and runs_kernel(qkv)):
        return False
    heads, kv_heads, _ = (n // layout.head_dim for n in shape.out_features)
    across, most = tile_programs(rows.tiles, qkv.shape[0]), gcd(heads, kv_heads, _BLOCK_HEADS)
    fewest, blocks = fewest_blocks(gpu_of(qkv.device)), heads + 2 * kv_heads
    block_heads = fitting_span(most, 1, (blocks,), across, fewest)
    _expand_rope_kernel[(blocks // block_heads, across)](
        qkv, places.positions, rotary.cos, rotary.sin, rotary.q_norm, rotary.k_norm,
        places.kv_slots, *expand_arguments(adapters, rows), qkv.stride(0), layout.page_elements,
        qkv.shape[0], 3 * shape.max_rank, adapters.table.layers, adapters.layer, rotary.eps,
        HEADS=heads, KV_HEADS=kv_heads, BLOCK_HEADS=block_heads, PAGE_TOKENS=layout.page_tokens,
        CHUNKS=config.chunks(shape), PDL=config.pdl, num_stages=1, **adapters.constants,
        **expand_fragments.options(shape.max_rank), **config.launch_options,
    )  # fmt: skip
    return True
