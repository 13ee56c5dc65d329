"""Attention over the arena's pages: flash decoding, and chunked prefill.

    out = softmax(scale * q K^T) V    over a sequence's tokens up to the row's own, per head;
                                      query head h reads kv head h * kv_heads / heads

A row's result depends on its own sequence, on shapes and on the number of splits alone.
"""

from dataclasses import dataclass

import torch

from granatum.kernels import reference_attention as reference
from granatum.kernels.backend import (
    dot,
    jit,
    overlap_options,
    require,
    require_rows,
    runs_kernel,
    tl,
    triton,
)
from granatum.kernels.layout import KvLayout, Tiles

_MAX_SPLITS = 16
_SPLIT_TOKENS = 128
"""A split of fewer tokens costs more than it saves."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode attention is cut into blocks.

    dot:     whether the tensor cores multiply, for at least 16 query heads at a time;
    block_t: tokens that a block takes at a time, of 16 bits; half of them are taken of 32;
    blocks:  how many keep the GPU's memory busy;
    splits:  at least so many of a row's tokens, lest the longest sequence's blocks end last.
    """

    dot: bool
    block_t: int
    warps: int
    stages: int
    blocks: int
    splits: int


GROUPED = DecodeConfig(True, 64, 2, 3, 4 * 132, 1)
"""Where query heads share keys."""
SINGLE = DecodeConfig(False, 16, 1, 2, 16 * 132, 4)
"""Where each has its own. A block takes but 8 KB at a time: one split at 32 rows is 6 % faster if
sequences are equally long, and much slower if not."""
_LOG2_E = 1.4426950408889634
_NEVER = tl.constexpr(-1e30)
"""Below every score: no infinities, whose differences are no numbers."""


@jit()
def _token_offsets(
    table, t, length, page_elements, head, PAGE_TOKENS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Element offsets in the arena of tokens t of one plane's head, but for the layer's start."""
    page = tl.load(table + t // PAGE_TOKENS, mask=t < length, other=0).to(tl.int64)
    return page * page_elements + (head * PAGE_TOKENS + t % PAGE_TOKENS) * D


@jit()
def _softmax_step(scores, top, total):
    """Of a running softmax: these scores' weights, new maximum and sum, the old sums' factor."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    kept = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    return weights, new_top, total * kept + tl.sum(weights, axis=1), kept


@jit("layer", "table_stride")
def _decode_kernel(
    q, arena, page_table, lengths, out, workspace,
    q_stride, out_stride, table_stride, page_elements, layer, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: the query heads of a row that share a kv head, over a split of its tokens.

    With one split it writes the output, else a partial [splits, row, head] of maximum, sum and
    unnormalised values, D + 2 apart.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_T), SPLITS) * BLOCK_T
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    head = kv_head * GROUP + g
    real = (g < GROUP)[:, None] & (d < D)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    q_at = q + row * q_stride + head[:, None] * D + d[None, :]
    qs = tl.load(q_at, mask=real, other=0.0)
    table = page_table + row * table_stride
    keys = arena + layer.to(tl.int64) * (2 * KV_HEADS * PAGE_TOKENS * D)
    values = keys + KV_HEADS * PAGE_TOKENS * D
    top = tl.full((BLOCK_G,), _NEVER, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    summed = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        at = _token_offsets(table, t, end, page_elements, kv_head, PAGE_TOKENS, D)
        there = (t < end)[:, None] & (d < D)[None, :]
        v = tl.load(values + at[:, None] + d[None, :], mask=there, other=0.0)
        if DOT:
            turned = (t < end)[None, :] & (d < D)[:, None]
            k = tl.load(keys + at[None, :] + d[:, None], mask=turned, other=0.0)
            scores = dot(qs, k, tl.zeros((BLOCK_G, BLOCK_T), tl.float32))
        else:
            k = tl.load(keys + at[:, None] + d[None, :], mask=there, other=0.0)
            scores = tl.sum(qs.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
        scores = tl.where((t < end)[None, :], scores * scale, _NEVER)
        weights, top, total, kept = _softmax_step(scores, top, total)
        if DOT:
            summed = dot(weights.to(v.dtype), v, summed * kept[:, None])
        else:
            column = tl.reshape(weights, (BLOCK_T,))[:, None]
            summed = summed * kept[:, None] + tl.sum(column * v.to(tl.float32), axis=0)[None, :]
    if SPLITS == 1:
        result = summed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + row * out_stride + head[:, None] * D + d[None, :], result, mask=real)
    else:
        rows = tl.num_programs(0).to(tl.int64)
        partial = workspace + ((split * rows + row) * HEADS + head) * (D + 2)
        tl.store(partial, top, mask=g < GROUP)
        tl.store(partial + 1, total, mask=g < GROUP)
        filled = (g < tl.where(begin < end, GROUP, 0))[:, None] & (d < D)[None, :]
        tl.store(partial[:, None] + 2 + d[None, :], summed, mask=filled)


@jit()
def _combine_kernel(
    workspace, out, out_stride,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One block: a head of a row; weighs its splits, in order, by their softmax maxima."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    at = workspace + ((s * rows + row) * HEADS + head) * (D + 2)
    tops = tl.load(at)
    totals = tl.load(at + 1)
    weights = tl.where(totals > 0, tl.exp2(tops - tl.max(tops, axis=0)), 0.0)
    there = (totals > 0)[:, None] & (d < D)[None, :]
    sums = tl.load(at[:, None] + 2 + d[None, :], mask=there, other=0.0)
    total = tl.sum(weights * totals, axis=0)
    result = tl.sum(sums * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * out_stride + head * D + d, result, mask=d < D)


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
        top = tl.full((BLOCK_M,), _NEVER, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        summed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        end = position + rows
        for start in range(0, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            at = _token_offsets(table, t, end, page_elements, kv_head, PAGE_TOKENS, D)
            there = (t < end)[None, :] & (d < D)[:, None]
            k = tl.load(keys + at[None, :] + d[:, None], mask=there, other=0.0)
            scores = dot(qs, k, tl.zeros((BLOCK_M, BLOCK_T), tl.float32))
            seen = t[None, :] <= (position + m)[:, None]
            scores = tl.where(seen & (t < end)[None, :], scores * scale, _NEVER)
            weights, top, total, kept = _softmax_step(scores, top, total)
            there = (t < end)[:, None] & (d < D)[None, :]
            v = tl.load(values + at[:, None] + d[None, :], mask=there, other=0.0)
            summed = dot(weights.to(v.dtype), v, summed * kept[:, None])
        out_at = out + row[:, None] * out_stride + head * D + d[None, :]
        tl.store(out_at, summed / total[:, None], mask=real)


def decode_splits(rows: int, heads: int, kv: KvLayout, max_tokens: int) -> int:
    """Splits of each row's tokens, by shapes alone: enough blocks to keep the memory busy."""
    config = decode_config(heads, kv)
    splits = max(config.blocks // (rows * kv.kv_heads), config.splits)
    splits = min(splits, max_tokens // _SPLIT_TOKENS, _MAX_SPLITS)
    return 1 << max(splits, 1).bit_length() - 1


def decode_config(heads: int, kv: KvLayout) -> DecodeConfig:
    """What was measured to be best on an H200."""
    return SINGLE if heads == kv.kv_heads else GROUPED


def decode_workspace_elements(rows: int, heads: int, kv: KvLayout, max_tokens: int) -> int:
    """Float32 elements of workspace that `decode_attention` needs; max_tokens as it sees them."""
    return decode_splits(rows, heads, kv, max_tokens) * rows * heads * (kv.head_dim + 2)


def decode_attention(
    q: torch.Tensor,
    arena: torch.Tensor,
    kv: KvLayout,
    layer: int,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """Attention of one row per sequence over its `lengths` tokens, the row's own among them.

    q, out [T, heads * head_dim], rows evenly apart (q may be a view of the fused projections).
    page_table int32 [T, pages of the longest sequence]; entries past a sequence's end are not
    read. lengths int32 [T]; 0: a padding row, whose output is 0. workspace float32,
    `decode_workspace_elements` of `page_table.shape[1] * page_tokens` tokens at least.
    """
    rows, heads = _require_queries(q, out, kv)
    require(lengths.shape == (rows,), f"lengths must be [{rows}]")
    require_rows("page_table", page_table, (rows, page_table.shape[1]))
    if not runs_kernel(q):
        reference.decode_attention(q, arena, kv, layer, page_table, lengths, scale, out)
        return
    splits = decode_splits(rows, heads, kv, page_table.shape[1] * kv.page_tokens)
    needed = splits * rows * heads * (kv.head_dim + 2)
    require(workspace.numel() >= needed, f"the workspace must be {needed} float32 elements")
    launch_decode(
        q, arena, kv, layer, page_table, lengths, scale, out, workspace, splits,
        decode_config(heads, kv),
    )  # fmt: skip


def launch_decode(
    q: torch.Tensor,
    arena: torch.Tensor,
    kv: KvLayout,
    layer: int,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: torch.Tensor,
    splits: int,
    config: DecodeConfig,
) -> None:
    """The kernels in one configuration; the arguments were checked."""
    rows, heads = q.shape[0], q.shape[1] // kv.head_dim
    group = heads // kv.kv_heads
    block_d = triton.next_power_of_2(kv.head_dim)
    _decode_kernel[(rows, kv.kv_heads, splits)](
        q,
        arena,
        page_table,
        lengths,
        out,
        workspace,
        q.stride(0),
        out.stride(0),
        page_table.stride(0),
        kv.page_elements,
        layer,
        scale * _LOG2_E,
        HEADS=heads,
        KV_HEADS=kv.kv_heads,
        PAGE_TOKENS=kv.page_tokens,
        D=kv.head_dim,
        BLOCK_G=max(16, triton.next_power_of_2(group)) if config.dot else 1,
        BLOCK_T=config.block_t * 2 // q.element_size(),
        BLOCK_D=block_d,
        SPLITS=splits,
        DOT=config.dot,
        STAGES=config.stages,
        num_warps=config.warps,
        **overlap_options(q),
    )
    if splits > 1:
        _combine_kernel[(rows, heads)](
            workspace,
            out,
            out.stride(0),
            HEADS=heads,
            D=kv.head_dim,
            BLOCK_D=block_d,
            SPLITS=splits,
            num_warps=1,
            **overlap_options(q),
        )


def prefill_attention(
    q: torch.Tensor,
    arena: torch.Tensor,
    kv: KvLayout,
    layer: int,
    page_table: torch.Tensor,
    tiles: Tiles,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of each tile's rows over their sequence's tokens, already in the arena.

    A tile is (row of page_table, first row of q, rows, position of that row), as
    `layout.make_query_tiles` makes them. q, out [T, heads * head_dim], rows evenly apart; rows in
    no tile are left alone. page_table int32 [sequences, pages].
    """
    _, heads = _require_queries(q, out, kv)
    require_rows("page_table", page_table, tuple(page_table.shape))
    if not runs_kernel(q):
        reference.prefill_attention(q, arena, kv, layer, page_table, tiles, scale, out)
        return
    _prefill_kernel[(tiles.capacity, heads)](
        q,
        arena,
        page_table,
        tiles.entries,
        tiles.count,
        out,
        q.stride(0),
        out.stride(0),
        page_table.stride(0),
        kv.page_elements,
        layer,
        scale * _LOG2_E,
        HEADS=heads,
        KV_HEADS=kv.kv_heads,
        PAGE_TOKENS=kv.page_tokens,
        D=kv.head_dim,
        BLOCK_M=max(16, triton.next_power_of_2(tiles.block_m)),
        BLOCK_T=64 if q.dtype.itemsize == 2 else 32,
        BLOCK_D=max(16, triton.next_power_of_2(kv.head_dim)),
        num_warps=4,
        num_stages=2,
    )


def _require_queries(q: torch.Tensor, out: torch.Tensor, kv: KvLayout) -> tuple[int, int]:
    """Rows and query heads, of q and out as they must be."""
    rows, width = q.shape
    require_rows("q", q, (rows, width))
    require_rows("out", out, (rows, width))
    require(width % (kv.kv_heads * kv.head_dim) == 0, f"q's width {width} does not fit {kv}")
    return rows, width // kv.head_dim
