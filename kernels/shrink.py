"""SGMV-shrink: the partial sums of x A^T that `expand` reduces."""

import torch

from granatum.kernels import reference_lora as reference
from granatum.kernels.backend import dot, jit, require, require_rows, runs_kernel, tl
from granatum.kernels.layout import FIRST_PROJECTION, GROUP_PROJECTIONS, AdapterTable, Tiles
from granatum.kernels.tuning import Config, Shape, config_for, power_of_two


@jit()
def source_rows(order, first, rows, m):
    """The rows of x and y that are a tile's m-th rows."""
    row = first + m
    if order is not None:
        row = tl.load(order + row, mask=m < rows, other=0)
    return row.to(tl.int64)


@jit("rows_total", "layers", "layer")
def _shrink_rows_kernel(
    x,
    arena,
    a_offsets,
    ranks,
    entries,
    count,
    order,
    partials,
    x_stride,
    rows_total,
    layers,
    layer,
    GROUP: tl.constexpr,
    PROJECTION: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block: a tile, a chunk of K, every RANK_BLOCKS-th block of BLOCK_R stacked ranks.

    Products and sums stay in registers; a chunk of A is loaded whole, and the next rank block
    while this one is summed, so that many bytes are in flight. BLOCK_K = CHUNK_K.
    """
    pid = tl.program_id(0)
    rank_block = pid % RANK_BLOCKS
    chunk = pid // RANK_BLOCKS % CHUNKS
    tile = pid // (RANK_BLOCKS * CHUNKS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    used = tl.load(count)
    slot = tl.load(entries + tile * 4)
    first = tl.load(entries + tile * 4 + 1)
    rows = tl.load(entries + tile * 4 + 2)
    if tile < used:
        place = slot.to(tl.int64) * layers + layer
        offset = tl.load(a_offsets + place * 4 + GROUP)
        stacked = tl.load(ranks + place * 7 + PROJECTION)
        for p in tl.static_range(1, PROJECTIONS):
            stacked += tl.load(ranks + place * 7 + PROJECTION + p)
        a_start = arena + tl.multiple_of(offset, 32)
        r = tl.arange(0, BLOCK_R)
        k = chunk * CHUNK_K + tl.arange(0, BLOCK_K)
        m = tl.arange(0, BLOCK_M)
        rank = rank_block * BLOCK_R + r
        inside = (rank < stacked)[:, None] & (k < K)[None, :]
        a = tl.load(a_start + rank[:, None] * K + k[None, :], mask=inside, other=0.0)
        x_rows = x + source_rows(order, first, rows, m)[:, None] * x_stride
        if PDL:
            tl.extra.cuda.gdc_wait()
        present = (m < rows)[:, None] & (k < K)[None, :]
        xs = tl.load(x_rows + k[None, :], mask=present, other=0.0).to(tl.float32)
        out = partials + (chunk * rows_total + first + m).to(tl.int64) * (PROJECTIONS * MAX_RANK)
        for start in range(rank_block * BLOCK_R, stacked, RANK_BLOCKS * BLOCK_R):
            ahead = start + RANK_BLOCKS * BLOCK_R + r
            inside = (ahead < stacked)[:, None] & (k < K)[None, :]
            a_next = tl.load(a_start + ahead[:, None] * K + k[None, :], mask=inside, other=0.0)
            sums = tl.sum(xs[:, None, :] * a.to(tl.float32)[None, :, :], axis=2)
            rank = start + r
            kept = (m < rows)[:, None] & (rank < stacked)[None, :]
            tl.store(out[:, None] + rank[None, :], sums, mask=kept)
            a = a_next
    elif PDL:
        tl.extra.cuda.gdc_wait()


@jit("rows_total", "layers", "layer")
def _shrink_tiles_kernel(
    x,
    arena,
    a_offsets,
    ranks,
    entries,
    count,
    order,
    partials,
    x_stride,
    rows_total,
    layers,
    layer,
    GROUP: tl.constexpr,
    PROJECTION: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """One block as in `_shrink_rows_kernel`, on the tensor cores, in steps of BLOCK_K."""
    pid = tl.program_id(0)
    rank_block = pid % RANK_BLOCKS
    chunk = pid // RANK_BLOCKS % CHUNKS
    tile = pid // (RANK_BLOCKS * CHUNKS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tile < tl.load(count):
        slot = tl.load(entries + tile * 4)
        first = tl.load(entries + tile * 4 + 1)
        rows = tl.load(entries + tile * 4 + 2)
        place = slot.to(tl.int64) * layers + layer
        offset = tl.load(a_offsets + place * 4 + GROUP)
        stacked = tl.load(ranks + place * 7 + PROJECTION)
        for p in tl.static_range(1, PROJECTIONS):
            stacked += tl.load(ranks + place * 7 + PROJECTION + p)
        a_start = arena + tl.multiple_of(offset, 32)
        m = tl.arange(0, BLOCK_M)
        x_rows = x + source_rows(order, first, rows, m)[:, None] * x_stride
        out = partials + (chunk * rows_total + first + m).to(tl.int64) * (PROJECTIONS * MAX_RANK)
        for start in range(rank_block * BLOCK_R, stacked, RANK_BLOCKS * BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)
            sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for step in range(0, CHUNK_K, BLOCK_K):
                k = chunk * CHUNK_K + step + tl.arange(0, BLOCK_K)
                present = (m < rows)[:, None] & (k < K)[None, :]
                xs = tl.load(x_rows + k[None, :], mask=present, other=0.0)
                inside = (k < K)[:, None] & (rank < stacked)[None, :]
                a = tl.load(a_start + rank[None, :] * K + k[:, None], mask=inside, other=0.0)
                sums = dot(xs, a, sums)
            kept = (m < rows)[:, None] & (rank < stacked)[None, :]
            tl.store(out[:, None] + rank[None, :], sums, mask=kept)


def shrink(
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """workspace[c, t, j] = x[t, chunk c] @ A[j, chunk c], for each row j of t's stacked A.

    Arguments as in `lora.add_lora`. It needs x alone, so it may run beside the base model's GEMM.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    rows, in_features = x.shape
    require_rows("x", x, (rows, in_features))
    require(x.dtype == arena.dtype, f"x is {x.dtype}, the arena {arena.dtype}")
    require(len(out_features) == GROUP_PROJECTIONS[group], f"group {group} is not {out_features}")
    shape = Shape(in_features, out_features, table.max_rank, tiles.block_m)
    config = config_for(shape, x.device)
    config.require_workspace(workspace, shape, rows)
    if not runs_kernel(x):
        reference.shrink(x, arena, table, layer, group, out_features, tiles, workspace)
        return
    launch_shrink(x, arena, table, layer, group, tiles, workspace, shape, config)


def launch_shrink(
    x: torch.Tensor,
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
    chunks = config.chunks(shape)
    kernel = _shrink_tiles_kernel if shape.dot else _shrink_rows_kernel
    kernel[(tiles.capacity * chunks * config.rank_blocks,)](
        x,
        arena,
        table.a,
        table.rank,
        tiles.entries,
        tiles.count,
        tiles.order,
        workspace,
        x.stride(0),
        x.shape[0],
        table.layers,
        layer,
        GROUP=group,
        PROJECTION=FIRST_PROJECTION[group],
        PROJECTIONS=len(shape.out_features),
        MAX_RANK=shape.max_rank,
        K=shape.in_features,
        CHUNKS=chunks,
        CHUNK_K=config.chunk_k,
        RANK_BLOCKS=config.rank_blocks,
        BLOCK_M=power_of_two(shape.block_m),
        BLOCK_K=config.shrink_k,
        BLOCK_R=config.shrink_r,
        PDL=config.pdl,
        num_warps=config.shrink_warps,
        num_stages=config.shrink_stages,
        **config.launch_options,
    )
