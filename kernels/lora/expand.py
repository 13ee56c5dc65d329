"""SGMV-expand: adds the partial sums of a shrink, multiplies with B and adds to y, or makes y."""

from collections.abc import Sequence
from typing import Any

import torch

from granatum.kernels.backend import dot, jit, require, require_rows, runs_kernel, tl, triton
from granatum.kernels.device import Gpu, gpu_of
from granatum.kernels.layout import FIRST_PROJECTION, GROUP_PROJECTIONS, AdapterTable, Tiles
from granatum.kernels.lora import expand_fragments as fragments
from granatum.kernels.lora import reference
from granatum.kernels.lora.lookup import (
    find_slice,
    load_adapter_tile,
    load_tile,
    rank_before,
    source_rows,
)
from granatum.kernels.lora.shrink import load_inside, tile_programs
from granatum.kernels.lora.tuning import Config, Shape, config_for, power_of_two


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_rows_kernel(
    y,
    arena,
    b_offsets,
    ranks,
    scales,
    entries,
    count,
    order,
    partials,
    y_stride,
    rows_total,
    workspace_width,
    layers,
    layer,
    PROJECTION: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: BLOCK_N columns of one projection, a tile, its ranks in turn.

    The first BLOCK_R rows of B are loaded before the shrink is over if it allows; B of that rank
    at most stays in registers for the tile's rows, each the same sums whatever its company. The
    next row's partials and y are loaded while one is multiplied.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    slot, first, rows = load_adapter_tile(entries, count, tile)
    p, column, width, begin = find_slice(block, N0, N1, N2, BLOCK_N)
    place = (slot * layers + layer) * 7 + PROJECTION
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


@jit()
def _sum_chunks(at, known, chunk_stride, CHUNKS: tl.constexpr):
    """A shrink's results: its partial sums, added in order."""
    total = tl.load(at, mask=known, other=0.0)
    for chunk in range(1, CHUNKS):
        total += tl.load(at + chunk * chunk_stride, mask=known, other=0.0)
    return total


@jit()
def _dot_expanded(v, b, total):
    """total + v @ b; with a bfloat16 b, v's high and low halves in turn, else both as float32."""
    if b.dtype == tl.bfloat16:
        high = v.to(tl.bfloat16)
        total = dot(high, b, total)
        total = dot((v - high.to(tl.float32)).to(tl.bfloat16), b, total)
    else:
        total = dot(v, b.to(tl.float32), total)
    return total


@jit("rows_total", "workspace_width", "layers", "layer")
def _expand_tiles_kernel(
    y,
    bias,
    arena,
    b_offsets,
    ranks,
    scales,
    entries,
    count,
    order,
    partials,
    y_stride,
    rows_total,
    workspace_width,
    layers,
    layer,
    PROJECTION: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: SPAN columns of one projection, in steps of BLOCK_N, of every so many-th tile.

    The first BLOCK_R ranks' intermediate is summed once for all columns. ADD: to y; if not, y is
    made, of the bias and what the adapter adds.
    """
    p, column, width, begin = find_slice(tl.program_id(0), N0, N1, N2, SPAN)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    chunk_stride = rows_total.to(tl.int64) * workspace_width
    for tile in range(tl.program_id(1), tl.load(count), tl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = (tl.maximum(slot, 0) * layers + layer) * 7 + PROJECTION
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
        tl.extra.cuda.gdc_wait()  # as in `_expand_rows_kernel`


def expand(
    y: torch.Tensor,
    in_features: int,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """y[t, slice p] += scale_p * (sum of t's partials of p) @ B_p, after `shrink`.

    Arguments as in `lora.add_lora`; `in_features` is K, which says how many partials there are.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    shape, config = check_expand(y, in_features, table, group, out_features, tiles, workspace)
    if not runs_kernel(y):
        reference.expand(y, in_features, arena, table, layer, group, out_features, tiles, workspace)
        return
    launch_expand(y, arena, table, layer, group, tiles, workspace, shape, config)


def expand_from(
    bias: torch.Tensor | None,
    y: torch.Tensor,
    in_features: int,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """y[t, slice p] = bias[slice p] + scale_p * (sum of t's partials of p) @ B_p of tiles' rows t.

    As `expand`, but y is made; rows of tiles without an adapter, and projections that an adapter
    leaves alone, are the bias [N], or 0 if there is none. For tiles long enough for the tensor
    cores.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    shape, config = check_expand(y, in_features, table, group, out_features, tiles, workspace)
    require(shape.dot, f"tiles of {tiles.block_m} rows are too short")
    if bias is not None:
        require_rows("bias", bias, (y.shape[1],))
    if not runs_kernel(y):
        reference.expand_from(
            bias, y, in_features, arena, table, layer, group, out_features, tiles, workspace
        )
        return
    launch_expand(
        y, arena, table, layer, group, tiles, workspace, shape, config, add=False, bias=bias
    )


def check_expand(
    y: torch.Tensor,
    in_features: int,
    table: AdapterTable,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
    workspace: torch.Tensor,
) -> tuple[Shape, Config]:
    """Refuse what an expand into y cannot take; else its shape and how it is cut into blocks.

    Raises:
        ValueError: naming it.
    """
    require_rows("y", y, (y.shape[0], sum(out_features)))
    require(len(out_features) == GROUP_PROJECTIONS[group], f"group {group} is not {out_features}")
    shape = Shape(in_features, out_features, table.max_rank, tiles.block_m)
    config = config_for(shape, y.device)
    config.require_workspace(workspace, shape, y.shape[0])
    return shape, config


def launch_expand(
    y: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    tiles: Tiles,
    workspace: torch.Tensor,
    shape: Shape,
    config: Config,
    *,
    add: bool = True,
    bias: torch.Tensor | None = None,
) -> None:
    """The kernel in one configuration; its arguments were checked. Without `add` y is made."""
    outs = (*shape.out_features, 0, 0)[:3]
    kernel: Any = _expand_rows_kernel
    made: tuple[torch.Tensor | None, ...] = ()
    span, across = config.expand_span, tiles.capacity
    options: dict[str, Any] = {"BLOCK_N": config.expand_n, "BLOCK_R": config.expand_r}
    options |= {"num_warps": config.expand_warps}
    if shape.dot:
        made, across = (bias,), tile_programs(tiles, y.shape[0])
        least, kernel = config.expand_n, _expand_tiles_kernel
        options |= {"BLOCK_M": power_of_two(shape.block_m)}
        if fragments.serves(y, shape, fragments.PAIR):
            least, kernel = fragments.PAIR, fragments.expand_kernel
            options = fragments.options(shape.max_rank)
        span = fitting_span(span, least, outs, across, fewest_blocks(gpu_of(y.device)))
        options |= {"SPAN": span, "ADD": add}
    kernel[(_blocks(outs, span), across)](
        y,
        *made,
        arena,
        table.b,
        table.rank,
        table.scale,
        tiles.entries,
        tiles.count,
        tiles.order,
        workspace,
        y.stride(0),
        y.shape[0],
        len(shape.out_features) * shape.max_rank,
        table.layers,
        layer,
        PROJECTION=FIRST_PROJECTION[group],
        PROJECTIONS=len(shape.out_features),
        N0=outs[0],
        N1=outs[1],
        N2=outs[2],
        CHUNKS=config.chunks(shape),
        PDL=config.pdl,
        num_stages=1,  # the compiler copies B ahead with more, and spills
        **options,
        **config.launch_options,
    )


def fitting_span(span: int, least: int, outs: Sequence[int], across: int, fewest: int) -> int:
    """Columns that a block goes through: fewer where there are few rows, to fill the GPU.

    That changes no sum.
    """
    while span > least and _blocks(outs, span) * across < fewest:
        span //= 2
    return span


def fewest_blocks(gpu: Gpu) -> int:
    """Blocks of long tiles that keep a GPU busy: one per multiprocessor, to a multiple of 32."""
    return gpu.sms // 32 * 32


def _blocks(outs: Sequence[int], span: int) -> int:
    return sum(-(-n // span) for n in outs)
