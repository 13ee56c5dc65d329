"""SGMV-expand of gate and up within the activation: no memory holds the adapters' part."""

from typing import Any

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.backend import jit, require_rows, runs_kernel, tl
from granatum.kernels.device import gpu_of
from granatum.kernels.gluon import gl, launch_dependents, of_triton, wait
from granatum.kernels.gluon import jit as gluon_jit
from granatum.kernels.layer.activation import silu
from granatum.kernels.lora import expand_fragments, fragments
from granatum.kernels.lora.cut import (
    cut_expand,
    expand_arguments,
    fitting_span,
    tile_programs,
)
from granatum.kernels.lora.lookup import load_tile, source_rows
from granatum.kernels.lora.tuning import Config, Shape, power_of_two

_BLOCKS_PER_SM = 3
"""Blocks of long tiles that a multiprocessor has room for, and gets where rows are few."""
_REGISTERS = 168
"""The most registers of a thread with which three such blocks fit a multiprocessor."""
_silu = of_triton(silu)


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_silu_rows_kernel(
    gate_up, out, arena, b_offsets, ranks, scales, entries, count, order, partials,
    y_stride, out_stride, rows_total, workspace_width, layers, layer,
    PROJECTION: tl.constexpr, LAYER_PROJECTIONS: tl.constexpr, N: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_HELD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_N columns of gate and the same of up, a tile, its ranks in turn.

    As `expand_rows.expand_rows_kernel`, for both at once.
    """
    tile = tl.program_id(1)
    slot, first, rows = load_tile(entries, count, tile)
    place = (tl.maximum(slot, 0) * layers + layer) * LAYER_PROJECTIONS + PROJECTION
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
                tl.store(out + source * out_stride + n, silu(gate) * up, mask=n < N)
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


@gluon_jit()
def _store_activated(finished, _turn, at, gate, up, ROWS: gl.constexpr):
    """Write what the activation makes of a pair."""
    out_rows, present = finished
    made = (_silu(gate) * up).to(out_rows.dtype.element_ty)
    gl.store(out_rows + at, fragments.to_rows(made, ROWS), mask=present)


@gluon_jit("rows_total", "workspace_width", "layers", "layer")
def _expand_silu_tiles_kernel(
    gate_up, out, arena, b_offsets, ranks, scales, entries, count, order, partials,
    y_stride, out_stride, rows_total, workspace_width, layers, layer,
    PROJECTION: gl.constexpr, LAYER_PROJECTIONS: gl.constexpr, N: gl.constexpr,
    CHUNKS: gl.constexpr, SPAN: gl.constexpr, PDL: gl.constexpr, ROWS: gl.constexpr,
    RANKS: gl.constexpr, COPIED: gl.constexpr, SUMS: gl.constexpr, HELD: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One block: SPAN columns of gate and of up, in steps, of every num_programs(1)-th tile.

    As `expand_fragments.expand_kernel`, for both at once.
    """
    column = gl.program_id(0) * SPAN
    m = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    n = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    chunk_stride = rows_total.to(gl.int64) * workspace_width
    y_ring, b_ring = fragments.make_rings(gate_up, STAGES)
    held = fragments.make_held(2, HELD)
    for tile in range(gl.program_id(1), gl.load(count), gl.num_programs(1)):
        slot, first, rows = expand_fragments.load_tile(entries, count, tile)
        place = (gl.maximum(slot, 0) * layers + layer) * LAYER_PROJECTIONS + PROJECTION
        gate_rank = gl.where(slot < 0, 0, gl.load(ranks + place))
        up_rank = gl.where(slot < 0, 0, gl.load(ranks + place + 1))
        gate_start = arena + gl.multiple_of(gl.load(b_offsets + place), 32)
        up_start = arena + gl.multiple_of(gl.load(b_offsets + place + 1), 32)
        gate_scale = gl.load(scales + place)
        up_scale = gl.load(scales + place + 1)
        present = (m < rows)[:, None]
        source = expand_fragments.source_rows(order, first + m, m < rows)[:, None]
        y_rows = gate_up + source * y_stride + n
        out_rows = out + source * out_stride + n
        if PDL:
            wait()
            launch_dependents()
        finished, room = (out_rows, present), (y_ring, b_ring, held)
        source = (partials, first, rows, chunk_stride, workspace_width)
        gate_side = (gate_start, 0, gate_rank, gate_scale)
        up_side = (up_start, gate_rank, up_rank, up_scale)
        columns, rank = gl.minimum(SPAN, N - column), gl.maximum(gate_rank, up_rank)
        if rank <= 16:
            expand_fragments.go_through(
                _store_activated, finished, y_rows, N, present, room, source, gate_side, up_side,
                column, columns, N, 64, True, CHUNKS, ROWS, RANKS, COPIED, SUMS, HELD, STAGES,
                False,
            )  # fmt: skip
        if HELD > 1 and rank > 16:
            expand_fragments.go_through(
                _store_activated, finished, y_rows, N, present, room, source, gate_side, up_side,
                column, columns, N, 64, True, CHUNKS, ROWS, RANKS, COPIED, SUMS, HELD, STAGES,
                True,
            )  # fmt: skip
    if PDL and gl.program_id(0) + gl.program_id(1) == 0:
        wait()  # as in `_expand_silu_rows_kernel`


def expand_silu_mul(
    gate_up: torch.Tensor, out: torch.Tensor, adapters: GroupAdapters, rows: LoraRows
) -> bool:
    """out[t] = silu(gate + g) * (up + u) of tiles' rows t: g and u of their adapters.

    After a `shrink` of the group. gate_up [T, 2 N] holds gate, then up, and may change; out [T, N].
    Tiles of slot -1 are rows without an adapter; rows in no tile are undefined. The rest as in
    `expand.expand`.

    Returns:
        Whether a kernel takes such rows; if not, nothing was done.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    shape, config = cut_expand(gate_up, adapters, rows)
    n = shape.out_features[0]
    require_rows("out", out, (gate_up.shape[0], n))
    served = all(
        expand_fragments.serves(y, shape, expand_fragments.BLOCK, 2) for y in (gate_up, out)
    )
    if not (runs_kernel(out) and (served or not shape.dot)):
        return False
    across = tile_programs(rows.tiles, out.shape[0]) if shape.dot else rows.tiles.capacity
    kernel, span, options = _kernel_for(shape, config, across, out.device)
    kernel[(-(-n // span), across)](
        gate_up, out, *expand_arguments(adapters, rows), gate_up.stride(0), out.stride(0),
        out.shape[0], 2 * shape.max_rank, adapters.table.layers, adapters.layer,
        N=n, CHUNKS=config.chunks(shape), PDL=config.pdl, num_stages=1,
        **adapters.constants, **options, **config.launch_options,
    )  # fmt: skip
    return True


def _kernel_for(
    shape: Shape, config: Config, across: int, device: torch.device
) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the columns that a block goes through, and the options that it alone has."""
    if shape.dot:
        fewest = _BLOCKS_PER_SM * gpu_of(device).sms
        columns = shape.out_features[:1]
        span = fitting_span(config.silu_n, expand_fragments.BLOCK, columns, across, fewest)
        options = expand_fragments.options(shape.max_rank)
        return _expand_silu_tiles_kernel, span, {"SPAN": span, "maxnreg": _REGISTERS, **options}
    return (
        _expand_silu_rows_kernel,
        config.silu_n,
        {
            "CHUNKS_HELD": power_of_two(config.chunks(shape)),
            "BLOCK_N": config.silu_n,
            "BLOCK_R": config.expand_r,
            "num_warps": config.expand_warps,
        },
    )
