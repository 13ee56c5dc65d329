"""SGMV-expand of gate and up within the activation: what adapters add never travels through y."""

from typing import Any

import torch

from granatum.kernels import reference_lora as reference
from granatum.kernels.backend import jit, require_rows, runs_kernel, tl
from granatum.kernels.expand import check_expand, dot_expanded, fitting_span, sum_chunks
from granatum.kernels.layout import FIRST_PROJECTION, GROUPS, AdapterTable, Tiles
from granatum.kernels.shrink import load_tile, source_rows, tile_programs
from granatum.kernels.tuning import power_of_two

GATE_UP = GROUPS.index("gate_up")


@jit()
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_silu_rows_kernel(
    gate_up,
    out,
    arena,
    b_offsets,
    ranks,
    scales,
    entries,
    count,
    order,
    partials,
    y_stride,
    out_stride,
    rows_total,
    workspace_width,
    layers,
    layer,
    PROJECTION: tl.constexpr,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_HELD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: BLOCK_N columns of gate and the same of up, a tile, its ranks in turn.

    As `expand._expand_rows_kernel`, for both at once.
    """
    tile = tl.program_id(1)
    slot, first, rows = load_tile(entries, count, tile)
    place = (tl.maximum(slot, 0) * layers + layer) * 7 + PROJECTION
    gate_rank = tl.where(slot < 0, 0, tl.load(ranks + place))
    up_rank = tl.where(slot < 0, 0, tl.load(ranks + place + 1))
    gate_start = arena + tl.multiple_of(tl.load(b_offsets + place), 32)
    up_start = arena + tl.multiple_of(tl.load(b_offsets + place + 1), 32)
    gate_scale = tl.load(scales + place)
    up_scale = tl.load(scales + place + 1)
    rank = tl.maximum(gate_rank, up_rank)
    if rows > 0:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        c = tl.arange(0, CHUNKS_HELD)
        b_at = r[:, None] * N + n[None, :]
        inside = (n < N)[None, :]
        gate_b = tl.load(gate_start + b_at, mask=(r < gate_rank)[:, None] & inside, other=0.0)
        up_b = tl.load(up_start + b_at, mask=(r < up_rank)[:, None] & inside, other=0.0)
        source = source_rows(order, first, True)
        row = source_rows(order, first + 1, rows > 1)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        chunk_row = c.to(tl.int64) * rows_total + first
        gate_v_at = partials + chunk_row[:, None] * workspace_width + r[None, :]
        up_v_at = gate_v_at + gate_rank
        held = (c < CHUNKS)[:, None]
        gate_v = tl.load(gate_v_at, mask=held & (r < gate_rank)[None, :], other=0.0)
        up_v = tl.load(up_v_at, mask=held & (r < up_rank)[None, :], other=0.0)
        y_at = gate_up + source * y_stride + n
        gate = tl.load(y_at, mask=n < N, other=0.0).to(tl.float32)
        up = tl.load(y_at + N, mask=n < N, other=0.0).to(tl.float32)
        m, done = 0, 0
        while m < rows:
            last = done + BLOCK_R >= rank
            done = tl.where(last, 0, done + BLOCK_R)
            m_next = tl.where(last, m + 1, m)
            further = m_next * workspace_width + done
            left = tl.where(m_next < rows, done + r, rank)
            gate_known = held & (left < gate_rank)[None, :]
            up_known = held & (left < up_rank)[None, :]
            gate_v_next = tl.load(gate_v_at + further, mask=gate_known, other=0.0)
            up_v_next = tl.load(up_v_at + further, mask=up_known, other=0.0)
            y_at = gate_up + row * y_stride + n
            more = n < tl.where(m + 1 < rows, N, 0)
            gate_next = tl.load(y_at, mask=more, other=0.0)
            up_next = tl.load(y_at + N, mask=more, other=0.0)
            v = tl.sum(gate_v, axis=0)[:, None]
            gate += gate_scale * tl.sum(v * gate_b.to(tl.float32), axis=0)
            v = tl.sum(up_v, axis=0)[:, None]
            up += up_scale * tl.sum(v * up_b.to(tl.float32), axis=0)
            if last:
                tl.store(out + source * out_stride + n, _silu(gate) * up, mask=n < N)
                gate = gate_next.to(tl.float32)
                up = up_next.to(tl.float32)
                source = row
            row = source_rows(order, first + m_next + 1, m_next + 1 < rows)
            if rank > BLOCK_R:
                at = done * N + b_at
                left = done + r
                known = (left < gate_rank)[:, None] & inside
                gate_b = tl.load(gate_start + at, mask=known, other=0.0)
                up_b = tl.load(up_start + at, mask=(left < up_rank)[:, None] & inside, other=0.0)
            m = m_next
            gate_v = gate_v_next
            up_v = up_v_next
    elif PDL and tl.program_id(0) + tile == 0:
        tl.extra.cuda.gdc_wait()  # one block that waits keeps the next kernel from overtaking


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_silu_tiles_kernel(
    gate_up,
    out,
    arena,
    b_offsets,
    ranks,
    scales,
    entries,
    count,
    order,
    partials,
    y_stride,
    out_stride,
    rows_total,
    workspace_width,
    layers,
    layer,
    PROJECTION: tl.constexpr,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: SPAN columns of gate and the same of up, in steps, of every so many-th tile.

    As `expand._expand_tiles_kernel`, for both at once.
    """
    column = tl.program_id(0) * SPAN
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    chunk_stride = rows_total.to(tl.int64) * workspace_width
    for tile in range(tl.program_id(1), tl.load(count), tl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (tl.maximum(slot, 0) * layers + layer) * 7 + PROJECTION
        gate_rank = tl.where(slot < 0, 0, tl.load(ranks + place))
        up_rank = tl.where(slot < 0, 0, tl.load(ranks + place + 1))
        gate_start = arena + tl.multiple_of(tl.load(b_offsets + place), 32)
        up_start = arena + tl.multiple_of(tl.load(b_offsets + place + 1), 32)
        gate_scale = tl.load(scales + place)
        up_scale = tl.load(scales + place + 1)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        present = (m < rows)[:, None]
        source = source_rows(order, first + m, m < rows)[:, None]
        gate_v_at = partials + (first + m).to(tl.int64)[:, None] * workspace_width + r[None, :]
        up_v_at = gate_v_at + gate_rank
        known = present & (r < gate_rank)[None, :]
        gate_v = gate_scale * sum_chunks(gate_v_at, known, chunk_stride, CHUNKS)
        known = present & (r < up_rank)[None, :]
        up_v = up_scale * sum_chunks(up_v_at, known, chunk_stride, CHUNKS)
        for at in range(column, tl.minimum(column + SPAN, N), BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            inside = (n < N)[None, :]
            kept = present & inside
            y_at = gate_up + source * y_stride + n[None, :]
            gate = tl.load(y_at, mask=kept, other=0.0).to(tl.float32)
            up = tl.load(y_at + N, mask=kept, other=0.0).to(tl.float32)
            b_at = r[:, None] * N + n[None, :]
            b = tl.load(gate_start + b_at, mask=(r < gate_rank)[:, None] & inside, other=0.0)
            gate = dot_expanded(gate_v, b, gate)
            b = tl.load(up_start + b_at, mask=(r < up_rank)[:, None] & inside, other=0.0)
            up = dot_expanded(up_v, b, up)
            for done in range(BLOCK_R, tl.maximum(gate_rank, up_rank), BLOCK_R):
                left = done + r
                b_at = left[:, None] * N + n[None, :]
                b = tl.load(gate_start + b_at, mask=(left < gate_rank)[:, None] & inside, other=0.0)
                known = present & (left < gate_rank)[None, :]
                v = gate_scale * sum_chunks(gate_v_at + done, known, chunk_stride, CHUNKS)
                gate = dot_expanded(v, b, gate)
                b = tl.load(up_start + b_at, mask=(left < up_rank)[:, None] & inside, other=0.0)
                known = present & (left < up_rank)[None, :]
                v = up_scale * sum_chunks(up_v_at + done, known, chunk_stride, CHUNKS)
                up = dot_expanded(v, b, up)
            tl.store(out + source * out_stride + n[None, :], _silu(gate) * up, mask=kept)
    if PDL and tl.program_id(0) + tl.program_id(1) == 0:
        tl.extra.cuda.gdc_wait()  # as in `_expand_silu_rows_kernel`


def expand_silu_mul(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    in_features: int,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """out[t] = silu(gate + g) * (up + u) of tiles' rows t: g and u of their adapters, float32.

    After a `shrink` of the group; gate_up [T, 2 N] holds gate, then up, and stays as it is;
    out [T, N]. Tiles of slot -1 are rows without an adapter; rows in no tile are not written. The
    rest as in `expand.expand`.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    rows, n = out.shape
    require_rows("out", out, (rows, n))
    place = (table, GATE_UP, (n, n), tiles, workspace)
    shape, config = check_expand(gate_up, in_features, *place)
    if not runs_kernel(out):
        reference.expand_silu_mul(gate_up, out, in_features, arena, table, layer, tiles, workspace)
        return
    kernel: Any = _expand_silu_rows_kernel
    span, across = config.expand_n // 2, tiles.capacity
    options = {"CHUNKS_HELD": power_of_two(config.chunks(shape))}
    if shape.dot:
        kernel, across = _expand_silu_tiles_kernel, tile_programs(tiles, rows)
        span = fitting_span(config.expand_span // 2, config.expand_n // 2, (n,), across)
        options = {"BLOCK_M": power_of_two(shape.block_m), "SPAN": span}
    kernel[(-(-n // span), across)](
        gate_up,
        out,
        arena,
        table.b,
        table.rank,
        table.scale,
        tiles.entries,
        tiles.count,
        tiles.order,
        workspace,
        gate_up.stride(0),
        out.stride(0),
        rows,
        2 * shape.max_rank,
        table.layers,
        layer,
        PROJECTION=FIRST_PROJECTION[GATE_UP],
        N=n,
        CHUNKS=config.chunks(shape),
        BLOCK_N=config.expand_n // 2,
        BLOCK_R=config.expand_r,
        PDL=config.pdl,
        num_warps=config.expand_warps,
        num_stages=1,
        **options,
        **config.launch_options,
    )
