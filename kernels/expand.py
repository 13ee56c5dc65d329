"""SGMV-expand: adds the partial sums of a shrink, multiplies with B and adds to y."""

import torch

from granatum.kernels import reference_lora as reference
from granatum.kernels.backend import dot, jit, require, require_rows, runs_kernel, tl, triton
from granatum.kernels.layout import FIRST_PROJECTION, GROUP_PROJECTIONS, AdapterTable, Tiles
from granatum.kernels.shrink import source_rows
from granatum.kernels.tuning import Config, Shape, config_for, power_of_two


@jit()
def _find_slice(block, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a group's n-th block of output: its projection, first column in it, width and start."""
    blocks0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    second = block >= blocks0
    third = block >= blocks0 + blocks1
    p = second.to(tl.int32) + third.to(tl.int32)
    block -= tl.where(third, blocks0 + blocks1, tl.where(second, blocks0, 0))
    width = tl.where(third, N2, tl.where(second, N1, N0))
    start = tl.where(third, N0 + N1, tl.where(second, N0, 0))
    return p, block * BLOCK_N, width, start


@jit()
def _rank_before(ranks, p, PROJECTIONS: tl.constexpr):
    """The projection's rank, and its first row in the group's stacked A."""
    rank = tl.load(ranks)
    column = tl.zeros_like(rank)
    for q in tl.static_range(1, PROJECTIONS):
        own = tl.load(ranks + q)
        column += tl.where(p >= q, tl.load(ranks + q - 1), 0)
        rank = tl.where(p == q, own, rank)
    return rank, column


@jit("rows_total", "layers", "layer")
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
    layers,
    layer,
    PROJECTION: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: a tile, BLOCK_N columns of one projection, all of its ranks in turn.

    The next BLOCK_R rows of B are loaded while these are multiplied, the first ones before the
    shrink is over if it allows.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (
        (N0 + BLOCK_N - 1) // BLOCK_N
        + (N1 + BLOCK_N - 1) // BLOCK_N
        + (N2 + BLOCK_N - 1) // BLOCK_N
    )
    tile = pid // blocks
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    used = tl.load(count)
    slot = tl.load(entries + tile * 4)
    first = tl.load(entries + tile * 4 + 1)
    rows = tl.load(entries + tile * 4 + 2)
    p, column, width, start = _find_slice(pid % blocks, N0, N1, N2, BLOCK_N)
    rank = 0
    if tile < used:
        place = (slot.to(tl.int64) * layers + layer) * 7 + PROJECTION
        rank, stacked_row = _rank_before(ranks + place, p, PROJECTIONS)
        offset = tl.load(b_offsets + place + p)
        scale = tl.load(scales + place + p)
        b_start = arena + tl.multiple_of(offset, 32)
        m = tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        c = tl.arange(0, triton.next_power_of_2(CHUNKS))
        b_at = b_start + r[:, None] * width + n[None, :]
        b = tl.load(b_at, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        row = (first + m).to(tl.int64)
        y_at = y + source_rows(order, first, rows, m)[:, None] * y_stride + start + n[None, :]
        if PDL:
            tl.extra.cuda.gdc_wait()
        kept = (m < tl.where(rank > 0, rows, 0))[:, None] & (n < width)[None, :]
        base = tl.load(y_at, mask=kept, other=0.0).to(tl.float32)
        chunk_row = c.to(tl.int64)[:, None] * rows_total + row[None, :]
        v_at = partials + chunk_row * (PROJECTIONS * MAX_RANK) + stacked_row
        known = (c < CHUNKS)[:, None] & (m < rows)[None, :]
        delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for done in range(0, rank, BLOCK_R):
            ahead = done + BLOCK_R + r
            b_at = b_start + ahead[:, None] * width + n[None, :]
            mask = (ahead < rank)[:, None] & (n < width)[None, :]
            b_next = tl.load(b_at, mask=mask, other=0.0)
            mask = known[:, :, None] & (done + r < rank)[None, None, :]
            v = tl.sum(
                tl.load(v_at[:, :, None] + (done + r)[None, None, :], mask=mask, other=0.0), 0
            )
            delta += tl.sum(v[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
            b = b_next
        tl.store(y_at, base + scale * delta, mask=kept)
    elif PDL:
        tl.extra.cuda.gdc_wait()


@jit("rows_total", "layers", "layer")
def _expand_tiles_kernel(
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
    layers,
    layer,
    PROJECTION: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block as in `_expand_rows_kernel`, on the tensor cores.

    For a bfloat16 B the float32 intermediate is multiplied as the sum of two bfloat16, for
    others as float32, so that it keeps its precision.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = (
        (N0 + BLOCK_N - 1) // BLOCK_N
        + (N1 + BLOCK_N - 1) // BLOCK_N
        + (N2 + BLOCK_N - 1) // BLOCK_N
    )
    tile = pid // blocks
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tile < tl.load(count):
        slot = tl.load(entries + tile * 4)
        first = tl.load(entries + tile * 4 + 1)
        rows = tl.load(entries + tile * 4 + 2)
        p, column, width, start = _find_slice(pid % blocks, N0, N1, N2, BLOCK_N)
        place = (slot.to(tl.int64) * layers + layer) * 7 + PROJECTION
        rank, stacked_row = _rank_before(ranks + place, p, PROJECTIONS)
        if rank > 0:
            offset = tl.load(b_offsets + place + p)
            scale = tl.load(scales + place + p)
            b_start = arena + tl.multiple_of(offset, 32)
            m = tl.arange(0, BLOCK_M)
            n = column + tl.arange(0, BLOCK_N)
            row = (first + m).to(tl.int64)
            y_at = y + source_rows(order, first, rows, m)[:, None] * y_stride + start + n[None, :]
            kept = (m < rows)[:, None] & (n < width)[None, :]
            v_at = partials + row[:, None] * (PROJECTIONS * MAX_RANK) + stacked_row
            chunk_stride = rows_total.to(tl.int64) * (PROJECTIONS * MAX_RANK)
            delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for done in range(0, rank, BLOCK_R):
                r = done + tl.arange(0, BLOCK_R)
                inside = (r < rank)[:, None] & (n < width)[None, :]
                b = tl.load(b_start + r[:, None] * width + n[None, :], mask=inside, other=0.0)
                known = (m < rows)[:, None] & (r < rank)[None, :]
                v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                for chunk in tl.static_range(CHUNKS):
                    v_chunk = v_at + chunk * chunk_stride + r[None, :]
                    v += tl.load(v_chunk, mask=known, other=0.0)
                if b.dtype == tl.bfloat16:
                    high = v.to(tl.bfloat16)
                    low = (v - high.to(tl.float32)).to(tl.bfloat16)
                    delta = dot(high, b, delta)
                    delta = dot(low, b, delta)
                else:
                    delta = dot(v, b.to(tl.float32), delta)
            base = tl.load(y_at, mask=kept, other=0.0).to(tl.float32)
            tl.store(y_at, base + scale * delta, mask=kept)


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
    rows = y.shape[0]
    require_rows("y", y, (rows, sum(out_features)))
    require(len(out_features) == GROUP_PROJECTIONS[group], f"group {group} is not {out_features}")
    shape = Shape(in_features, out_features, table.max_rank, tiles.block_m)
    config = config_for(shape, y.device)
    config.require_workspace(workspace, shape, rows)
    if not runs_kernel(y):
        reference.expand(y, in_features, arena, table, layer, group, out_features, tiles, workspace)
        return
    launch_expand(y, arena, table, layer, group, tiles, workspace, shape, config)


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
) -> None:
    """The kernel in one configuration; its arguments were checked."""
    outs = (*shape.out_features, 0, 0)[:3]
    blocks = sum(-(-n // config.expand_n) for n in outs)
    kernel = _expand_tiles_kernel if shape.dot else _expand_rows_kernel
    kernel[(tiles.capacity * blocks,)](
        y,
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
        table.layers,
        layer,
        PROJECTION=FIRST_PROJECTION[group],
        PROJECTIONS=len(shape.out_features),
        MAX_RANK=shape.max_rank,
        N0=outs[0],
        N1=outs[1],
        N2=outs[2],
        CHUNKS=config.chunks(shape),
        BLOCK_M=power_of_two(shape.block_m),
        BLOCK_N=config.expand_n,
        BLOCK_R=config.expand_r,
        PDL=config.pdl,
        num_warps=config.expand_warps,
        num_stages=config.expand_stages,
        **config.launch_options,
    )
