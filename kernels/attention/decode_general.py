"""Decode attention for any dtype and head dimension, in Triton; the interpreter runs it as well.

`decode_fragments` has the kernel that was measured to be faster for some heads.
"""

from granatum.kernels.attention.common import NEVER, softmax_step, token_offsets
from granatum.kernels.backend import dot, jit, tl
from granatum.kernels.layer.rope import load_angles, load_rotated


@jit()
def _add_own(qs, own_k, own_v, owner, scale, top, total, summed):
    """Go on with the softmaxes of qs [N, BLOCK_D] over their own token, where `owner` is set."""
    score = tl.sum(qs.to(tl.float32) * own_k.to(tl.float32), axis=1) * scale
    new_top = tl.where(owner, tl.maximum(top, score), top)
    kept = tl.exp2(top - new_top)
    weight = tl.where(owner, tl.exp2(score - new_top), 0.0)
    summed = summed * kept[:, None] + weight[:, None] * own_v.to(tl.float32)
    return new_top, total * kept + weight, summed


@jit()
def _attend_grouped(
    qs, keys, values, table, kv_head, begin, end, page_elements, scale, top, total, summed,
    PAGE_TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Go on with a softmax of query heads qs [BLOCK_G, BLOCK_D], on the tensor cores."""
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        at = token_offsets(table, t, end, page_elements, kv_head, PAGE_TOKENS, D)
        there = (t < end)[:, None] & (d < D)[None, :]
        turned = (t < end)[None, :] & (d < D)[:, None]
        v = tl.load(values + at[:, None] + d[None, :], mask=there, other=0.0)
        k = tl.load(keys + at[None, :] + d[:, None], mask=turned, other=0.0)
        scores = dot(qs, k, tl.zeros((qs.shape[0], BLOCK_T), tl.float32))
        scores = tl.where((t < end)[None, :], scores * scale, NEVER)
        weights, top, total, kept = softmax_step(scores, top, total, 1)
        summed = dot(weights.to(v.dtype), v, summed * kept[:, None])
    return top, total, summed


@jit()
def _attend_single(
    qs, keys, values, table, kv_head, begin, end, page_elements, scale, top, total, summed,
    PAGE_TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Go on with two softmaxes of one head, each over half of every tile; qs is the head twice.

    So half a warp holds a key or value in 16-byte parts, and only scores cross lanes.
    """
    d = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = BLOCK_T // 2
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, 2)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        if PAGE_TOKENS % BLOCK_T == 0:  # a tile lies in one page
            page = tl.load(table + start // PAGE_TOKENS).to(tl.int64)
            at = page * page_elements + (kv_head * PAGE_TOKENS + t % PAGE_TOKENS) * D
        else:
            at = token_offsets(table, t, end, page_elements, kv_head, PAGE_TOKENS, D)
        there = (t < end)[:, :, None] & (d < D)[None, None, :]
        k = tl.load(keys + at[:, :, None] + d[None, None, :], mask=there, other=0.0)
        v = tl.load(values + at[:, :, None] + d[None, None, :], mask=there, other=0.0)
        scores = tl.sum(qs.to(tl.float32)[:, None, :] * k.to(tl.float32), axis=2)
        scores = tl.where(t < end, scores * scale, NEVER)
        weights, top, total, kept = softmax_step(scores, top, total, 1)
        summed = summed * kept[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), axis=1)
    return top, total, summed


@jit()
def _join(tops, totals, sums):
    """Join N softmaxes [H, N], [H, N, D], each over a part of the tokens, to one [H], [H, D]."""
    top = tl.max(tops, axis=1)
    weights = tl.where(totals > 0, tl.exp2(tops - top[:, None]), 0.0)
    total = tl.sum(weights * totals, axis=1)
    return top, total, tl.sum(sums * weights[:, :, None], axis=1)


@jit()
def _piece_of(place, row_lengths, row_ends, row_pieces, BLOCK_T: tl.constexpr):
    """The n-th piece of all, n being `place`: its row, the row's length and number of pieces, its
    index in the row, its first token and its end (exclusive)."""
    r = tl.arange(0, row_lengths.shape[0])
    row = tl.sum((row_ends <= place).to(tl.int32), axis=0)
    length = tl.sum(tl.where(r == row, row_lengths, 0), axis=0)
    count = tl.sum(tl.where(r == row, row_pieces, 0), axis=0)
    piece = place - tl.sum(tl.where(r == row, row_ends - row_pieces, 0), axis=0)
    past = tl.maximum(length - 1, 0)
    size = tl.cdiv(tl.cdiv(past, BLOCK_T), tl.maximum(count, 1)) * BLOCK_T
    begin = piece * size
    return row.to(tl.int64), length, count, piece, begin, tl.minimum(begin + size, past)


@jit()
def _joined(at, wanted, count, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Attention [H, BLOCK_D] of wanted heads; a head's `count` partials begin at `at` [H].

    Four partials are loaded at a time, in their order.
    """
    d = tl.arange(0, BLOCK_D)
    top = tl.full(at.shape, NEVER, tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    summed = tl.zeros((at.shape[0], BLOCK_D), tl.float32)
    for start in range(0, count, 4):
        p = start + tl.arange(0, 4)
        there = wanted[:, None] & (p < count)[None, :]
        place = at[:, None] + p[None, :] * (HEADS * (D + 2))
        tops = tl.load(place, mask=there, other=NEVER, cache_modifier=".cg")
        totals = tl.load(place + 1, mask=there, other=0.0, cache_modifier=".cg")
        sums = tl.load(
            place[:, :, None] + 2 + d[None, None, :],
            mask=there[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        part_top, part_total, part = _join(tops, totals, sums)
        new_top = tl.maximum(top, part_top)
        kept, added = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        total = total * kept + part_total * added
        summed = summed * kept[:, None] + part * added[:, None]
        top = new_top
    return summed / tl.where(total > 0, total, 1.0)[:, None]


@jit("rows", "pieces", "piece_tokens", "layer", "table_stride")
def general_kernel(
    q, k, v, cos, sin, q_norm, k_norm, arena, page_table, lengths, out, partials, arrivals, turns,
    q_stride, k_stride, v_stride, out_stride, table_stride, page_elements, rows, pieces,
    piece_tokens, layer, scale, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    JOINED_HEADS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One block takes pieces in turn: some tokens of a row, for the query heads of one kv head.

    The block of a row's first piece also adds the row's own token and writes its key and value to
    the arena. If the row has one piece, the block writes the result; else every piece leaves a
    partial [row, piece, head] of maximum, sum and unnormalised values, D + 2 apart. The block that
    ends the row's last piece adds the partials in order. Which block takes which piece changes no
    result.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_ROWS)
    row_lengths = tl.load(lengths + r, mask=r < rows, other=0)
    row_pasts = tl.maximum(row_lengths - 1, 0)
    row_pieces = tl.minimum(tl.maximum(tl.cdiv(row_pasts, piece_tokens), 1), pieces)
    row_pieces = tl.where(r < rows, row_pieces, 0)
    row_ends = tl.cumsum(row_pieces, axis=0)
    items = tl.sum(row_pieces, axis=0) * KV_HEADS
    many = items > tl.num_programs(0)
    keys = arena + layer.to(tl.int64) * (2 * KV_HEADS * PAGE_TOKENS * D)
    values = keys + KV_HEADS * PAGE_TOKENS * D
    item = tl.program_id(0)
    row, length, count, piece, begin, end = _piece_of(
        item // KV_HEADS, row_lengths, row_ends, row_pieces, BLOCK_T
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    while item < items:
        kv_head = item % KV_HEADS
        past = tl.maximum(length - 1, 0)
        table = page_table + row * table_stride
        # The row's own key and value are loaded once for grouped heads, and twice for a single one.
        n = g if DOT else tl.arange(0, 2)
        m = tl.arange(0, 1) if DOT else tl.arange(0, 2)
        head = kv_head * GROUP + tl.where(n < GROUP, n, 0)
        q_at = q + row * q_stride + head[:, None] * D
        inside = (n >= 0)[:, None] & (d < D)[None, :]
        c, s = load_angles(cos, sin, past, d, inside, D)
        qs = load_rotated(q_at, d, inside, c, s, q_norm, eps, D).to(q.dtype.element_ty)
        own = kv_head * D + (m * 0)[:, None]
        k_at = k + row * k_stride + own
        inside = (m >= 0)[:, None] & (d < D)[None, :]
        if DOT:
            c, s = load_angles(cos, sin, past, d, inside, D)
        own_k = load_rotated(k_at, d, inside, c, s, k_norm, eps, D).to(k.dtype.element_ty)
        own_v = tl.load(v + row * v_stride + own + d[None, :], mask=inside, other=0.0)
        top = tl.full((n.shape[0],), NEVER, tl.float32)
        total = tl.zeros((n.shape[0],), tl.float32)
        summed = tl.zeros((n.shape[0], BLOCK_D), tl.float32)
        if DOT:
            top, total, summed = _attend_grouped(
                qs, keys, values, table, kv_head, begin, end, page_elements, scale,
                top, total, summed, PAGE_TOKENS, D, BLOCK_T, BLOCK_D, STAGES,
            )  # fmt: skip
        else:
            top, total, summed = _attend_single(
                qs, keys, values, table, kv_head, begin, end, page_elements, scale,
                top, total, summed, PAGE_TOKENS, D, BLOCK_T, BLOCK_D, STAGES,
            )  # fmt: skip
        owner = (piece == 0) & (length > 0)
        own_page = tl.load(table + past // PAGE_TOKENS, mask=owner, other=0).to(tl.int64)
        own_place = (kv_head * PAGE_TOKENS + past % PAGE_TOKENS) * D + d[None, :] + (m * 0)[:, None]
        written = (m < tl.where(owner, 1, 0))[:, None] & (d < D)[None, :]
        tl.store(keys + own_page * page_elements + own_place, own_k, mask=written)
        tl.store(values + own_page * page_elements + own_place, own_v, mask=written)
        first = n < tl.where(owner, BLOCK_G, 0)
        top, total, summed = _add_own(qs, own_k, own_v, first, scale, top, total, summed)
        if not DOT:
            top, total, summed = _join(top[None, :], total[None, :], summed[None, :, :])
        heads = kv_head * GROUP + g
        real = (g < GROUP)[:, None] & (d < D)[None, :]
        if count == 1:
            result = summed / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + row * out_stride + heads[:, None] * D + d[None, :], result, mask=real)
        else:
            row_partials = partials + row * pieces * (HEADS * (D + 2))
            own_partial = row_partials + (piece * HEADS + heads) * (D + 2)
            tl.store(own_partial, top, mask=g < GROUP)
            tl.store(own_partial + 1, total, mask=g < GROUP)
            tl.store(own_partial[:, None] + 2 + d[None, :], summed, mask=real)
            tl.debug_barrier()
            arrival = arrivals + row * KV_HEADS + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == count - 1:
                tl.store(arrival, 0)
                h = tl.arange(0, JOINED_HEADS)
                at = row_partials + (kv_head * GROUP + h) * (D + 2)
                result = _joined(at, h < GROUP, count, HEADS, D, BLOCK_D)
                result_at = out + row * out_stride + (kv_head * GROUP + h)[:, None] * D + d[None, :]
                tl.store(result_at, result, mask=(h < GROUP)[:, None] & (d < D)[None, :])
        if many:
            item = tl.atomic_add(turns, 1, sem="relaxed") + tl.num_programs(0)
            row, length, count, piece, begin, end = _piece_of(
                item // KV_HEADS, row_lengths, row_ends, row_pieces, BLOCK_T
            )
        else:
            item = items
    if many:
        ended = tl.atomic_add(turns + 1, 1, sem="relaxed") + 1
        if ended == tl.num_programs(0):
            tl.store(turns, 0)
            tl.store(turns + 1, 0)
