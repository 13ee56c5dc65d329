"""Decodes' expand: B stays in registers, and a tile's rows are multiplied with it one by one."""

from granatum.kernels.backend import jit, tl, triton
from granatum.kernels.lora.lookup import (
    find_slice,
    load_adapter_tile,
    load_inside,
    rank_before,
    source_rows,
)


@jit("rows_total", "workspace_width", "layers", "layer")
def expand_rows_kernel(
    y, arena, b_offsets, ranks, scales, entries, count, order, partials,
    y_stride, rows_total, workspace_width, layers, layer,
    PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr, LAYER_PROJECTIONS: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_N columns of one projection, a tile, its ranks in turn.

    The first BLOCK_R rows of B are loaded before the shrink has ended, where the shrink allows it.
    If B has no more rows, they stay in registers for all rows of the tile. A row's sums are the
    same in any company. While one row is multiplied, the next row's partials and y are loaded.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    slot, first, rows = load_adapter_tile(entries, count, tile)
    p, column, width, begin = find_slice(block, N0, N1, N2, BLOCK_N)
    place = (slot * layers + layer) * LAYER_PROJECTIONS + PROJECTION
    rank, stacked_row = rank_before(ranks + place, p, PROJECTIONS)
    b_start = arena + tl.multiple_of(tl.load(b_offsets + place + p), 32)
    scale = tl.load(scales + place + p)
    if (rows > 0) & (rank > 0):
        n = column + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        c = tl.arange(0, triton.next_power_of_2(CHUNKS))
        FULL: tl.constexpr = (
            8 % BLOCK_R == 0 and N0 % BLOCK_N == 0 and N1 % BLOCK_N == 0 and N2 % BLOCK_N == 0
        )
        b_at = b_start + r[:, None] * width + n[None, :]
        b = load_inside(b_at, (r < rank)[:, None] & (n < width)[None, :], FULL)
        y_at = y + source_rows(order, first, True) * y_stride + begin + n
        row = source_rows(order, first + 1, rows > 1)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        chunk_row = c.to(tl.int64) * rows_total + first
        v_at = partials + chunk_row[:, None] * workspace_width + stacked_row + r[None, :]
        known = (c < CHUNKS)[:, None] & (r < rank)[None, :]
        v = tl.load(v_at, mask=known, other=0.0)
        total = tl.load(y_at, mask=n < width, other=0.0).to(tl.float32)
        m, done = 0, 0
        while m < rows:
            last = done + BLOCK_R >= rank
            done = tl.where(last, 0, done + BLOCK_R)
            m_next = tl.where(last, m + 1, m)
            known = (c < CHUNKS)[:, None] & (done + r < tl.where(m_next < rows, rank, 0))[None, :]
            v_next = tl.load(v_at + m_next * workspace_width + done, mask=known, other=0.0)
            y_next_at = y + row * y_stride + begin + n
            y_next = tl.load(y_next_at, mask=n < tl.where(m + 1 < rows, width, 0), other=0.0)
            row = source_rows(order, first + m_next + 1, m_next + 1 < rows)
            total += scale * tl.sum(tl.sum(v, axis=0)[:, None] * b.to(tl.float32), axis=0)
            if last:
                tl.store(y_at, total, mask=n < width)
                total = y_next.to(tl.float32)
                y_at = y_next_at
            if rank > BLOCK_R:
                b_at = b_start + (done + r)[:, None] * width + n[None, :]
                b = load_inside(b_at, (done + r < rank)[:, None] & (n < width)[None, :], FULL)
            m = m_next
            v = v_next
    elif PDL and block + tile == 0:
        tl.extra.cuda.gdc_wait()  # one block that waits keeps the next kernel from overtaking
