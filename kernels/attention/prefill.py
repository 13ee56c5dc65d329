"""Chunked prefill: causal attention of prompts' rows over the arena's pages."""

import torch

from granatum.kernels.attention import reference
from granatum.kernels.attention.common import (
    LOG2_E,
    NEVER,
    require_queries,
    softmax_step,
    token_offsets,
)
from granatum.kernels.backend import dot, jit, require_rows, runs_kernel, tl, triton
from granatum.kernels.layout import LayerKv, Tiles


@jit("layer", "table_stride")
def _prefill_kernel(
    q, arena, page_table, entries, count, out,
    q_stride, out_stride, table_stride, page_elements, layer, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block: a tile's rows of one head, over the sequence's tokens up to the tile's last."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    if tile < tl.load(count):
        sequence = tl.load(entries + tile * 4)
        first = tl.load(entries + tile * 4 + 1)
        rows = tl.load(entries + tile * 4 + 2)
        position = tl.load(entries + tile * 4 + 3)
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        row = (first + m).to(tl.int64)
        real = (m < rows)[:, None] & (d < D)[None, :]
        qs = tl.load(q + row[:, None] * q_stride + head * D + d[None, :], mask=real, other=0.0)
        table = page_table + sequence.to(tl.int64) * table_stride
        kv_head = head // (HEADS // KV_HEADS)
        keys = arena + layer.to(tl.int64) * (2 * KV_HEADS * PAGE_TOKENS * D)
        values = keys + KV_HEADS * PAGE_TOKENS * D
        top = tl.full((BLOCK_M,), NEVER, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        end = position + rows
        for start in range(0, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            at = token_offsets(table, t, end, page_elements, kv_head, PAGE_TOKENS, D)
            there = (t < end)[None, :] & (d < D)[:, None]
            k = tl.load(keys + at[None, :] + d[:, None], mask=there, other=0.0)
            scores = dot(qs, k, tl.zeros((BLOCK_M, BLOCK_T), tl.float32))
            seen = t[None, :] <= (position + m)[:, None]
            scores = tl.where(seen & (t < end)[None, :], scores * scale, NEVER)
            weights, top, total, kept = softmax_step(scores, top, total, 1)
            there = (t < end)[:, None] & (d < D)[None, :]
            v = tl.load(values + at[:, None] + d[None, :], mask=there, other=0.0)
            summed = dot(weights.to(v.dtype), v, summed * kept[:, None])
        out_at = out + row[:, None] * out_stride + head * D + d[None, :]
        tl.store(out_at, summed / total[:, None], mask=real)


def prefill_attention(
    q: torch.Tensor,
    kv: LayerKv,
    page_table: torch.Tensor,
    tiles: Tiles,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of each tile's rows over their sequence's tokens, already in the arena.

    A tile is (row of page_table, first row of q, rows, position of the first row), as
    `layout.make_query_tiles` makes them. q, out [T, heads * head_dim], rows evenly apart; rows in
    no tile are left alone. page_table int32 [sequences, pages].

    Raises:
        ValueError: a shape or stride that the op cannot take.
    """
    layout = kv.layout
    _, heads = require_queries(q, out, layout)
    require_rows("page_table", page_table, tuple(page_table.shape))
    if not runs_kernel(q):
        reference.prefill_attention(q, kv, page_table, tiles, scale, out)
        return
    _prefill_kernel[(tiles.capacity, heads)](
        q, kv.arena, page_table, tiles.entries, tiles.count, out,
        q.stride(0), out.stride(0), page_table.stride(0), layout.page_elements, kv.layer,
        scale * LOG2_E,
        HEADS=heads, KV_HEADS=layout.kv_heads, PAGE_TOKENS=layout.page_tokens, D=layout.head_dim,
        BLOCK_M=max(16, triton.next_power_of_2(tiles.block_m)),
        BLOCK_T=64 if q.dtype.itemsize == 2 else 32,
        BLOCK_D=max(16, triton.next_power_of_2(layout.head_dim)), num_warps=4, num_stages=2,
    )  # fmt: skip
