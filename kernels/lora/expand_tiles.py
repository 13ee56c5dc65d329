"""Prompts' expand in Triton, for dtypes that `expand_fragments` does not take."""

from granatum.kernels.backend import dot, jit, tl
from granatum.kernels.lora.lookup import find_slice, load_tile, rank_before, source_rows


@jit()
def _sum_chunks(at, known, chunk_stride, CHUNKS: tl.constexpr):
    """A shrink's results: its partial sums, added in order."""
    total = tl.load(at, mask=known, other=0.0)
    for chunk in range(1, CHUNKS):
        total += tl.load(at + chunk * chunk_stride, mask=known, other=0.0)
    return total


@jit()
def _dot_expanded(v, b, total):
    """total + v @ b. A bfloat16 b is multiplied with v's high and low halves in turn; with another
    dtype both operands are float32."""
    if b.dtype == tl.bfloat16:
        high = v.to(tl.bfloat16)
        total = dot(high, b, total)
        total = dot((v - high.to(tl.float32)).to(tl.bfloat16), b, total)
    else:
        total = dot(v, b.to(tl.float32), total)
    return total


@jit("rows_total", "workspace_width", "layers", "layer")
def expand_tiles_kernel(
    y, bias, arena, b_offsets, ranks, scales, entries, count, order, partials,
    y_stride, rows_total, workspace_width, layers, layer,
    PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr, LAYER_PROJECTIONS: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, BLOCK_R: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: SPAN columns of a projection, in steps of BLOCK_N; every num_programs(1)-th tile.

    The intermediate of the first BLOCK_R ranks is summed once for all columns. ADD: the block adds
    to y; otherwise it writes y, the bias and what the adapter adds.
    """
    p, column, width, begin = find_slice(tl.program_id(0), N0, N1, N2, SPAN)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    chunk_stride = rows_total.to(tl.int64) * workspace_width
    for tile in range(tl.program_id(1), tl.load(count), tl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (tl.maximum(slot, 0) * layers + layer) * LAYER_PROJECTIONS + PROJECTION
        rank, stacked_row = rank_before(ranks + place, p, PROJECTIONS)
        rank = tl.where(slot < 0, 0, rank)
        b_start = arena + tl.multiple_of(tl.load(b_offsets + place + p), 32)
        scale = tl.load(scales + place + p)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if (rank > 0) | (not ADD):
            present = (m < rows)[:, None]
            y_rows = y + source_rows(order, first + m, m < rows)[:, None] * y_stride + begin
            v_at = partials + (first + m).to(tl.int64)[:, None] * workspace_width + stacked_row
            known = present & (r < rank)[None, :]
            v = _sum_chunks(v_at + r[None, :], known, chunk_stride, CHUNKS)
            for at in range(column, tl.minimum(column + SPAN, width), BLOCK_N):
                n = at + tl.arange(0, BLOCK_N)
                kept = present & (n < width)[None, :]
                if ADD:
                    base = tl.load(y_rows + n[None, :], mask=kept, other=0.0)
                b_at = b_start + r[:, None] * width + n[None, :]
                b = tl.load(b_at, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
                delta = _dot_expanded(v, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                for done in range(BLOCK_R, rank, BLOCK_R):
                    more = done + r
                    b_at = b_start + more[:, None] * width + n[None, :]
                    b = tl.load(b_at, mask=(more < rank)[:, None] & (n < width)[None, :], other=0.0)
                    v_more = _sum_chunks(
                        v_at + more[None, :], present & (more < rank)[None, :], chunk_stride, CHUNKS
                    )
                    delta = _dot_expanded(v_more, b, delta)
                total = scale * delta
                if ADD:
                    total += base.to(tl.float32)
                if bias is not None:
                    total += tl.load(bias + begin + n, mask=n < width).to(tl.float32)[None, :]
                tl.store(y_rows + n[None, :], total, mask=kept)
    if PDL and tl.program_id(0) + tl.program_id(1) == 0:
        tl.extra.cuda.gdc_wait()  # as in `expand_rows_kernel`
