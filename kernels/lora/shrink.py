"""SGMV-shrink: the partial sums of x A^T that `expand` reduces."""

from typing import Any

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.backend import dot, jit, require, require_rows, runs_kernel, tl
from granatum.kernels.lora import reference, shrink_fragments
from granatum.kernels.lora.cut import cut_rows, tile_programs
from granatum.kernels.lora.lookup import (
    load_adapter_tile,
    load_inside,
    load_tile,
    source_rows,
    stacked_a,
)
from granatum.kernels.lora.tuning import Config, Shape, power_of_two

_ROW_FEATURES = 256
"""Features in adjacent lanes, where rows are multiplied one by one."""
_ROW_RANKS = 4
"""Stacked ranks of a block, where rows are multiplied one by one."""


@jit("rows_total", "width", "layers", "layer")
def _shrink_rows_kernel(
    x, arena, a_offsets, ranks, entries, count, order, partials,
    x_stride, rows_total, width, layers, layer,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr, LAYER_PROJECTIONS: tl.constexpr,
    K: tl.constexpr, CHUNK_K: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BESIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: a chunk of K, a tile, every RANK_BLOCKS-th block of BLOCK_R stacked ranks.

    The chunk of A is loaded once, into registers, and serves the tile's rows in turn. A row's sums
    are the same in any company. While one row of x is multiplied, the next is loaded. Adjacent
    lanes hold BLOCK_K adjacent features.
    BESIDE: x is complete and `partials` is free when this kernel starts, so it does not wait. L1
    may hold an old x, so x is read past L1.
    """
    chunk = tl.program_id(0)
    tile = tl.program_id(1)
    rank_block = tl.program_id(2)
    slot, first, rows = load_adapter_tile(entries, count, tile)
    a_start, stacked = stacked_a(
        arena, a_offsets, ranks, slot * layers + layer, GROUP, GROUPS, PROJECTION, PROJECTIONS,
        LAYER_PROJECTIONS,
    )  # fmt: skip
    begin = rank_block * BLOCK_R
    if (rows > 0) & (begin < stacked):
        r = tl.arange(0, BLOCK_R)
        k = (
            chunk * CHUNK_K
            + tl.arange(0, CHUNK_K // BLOCK_K)[:, None] * BLOCK_K
            + tl.arange(0, BLOCK_K)[None, :]
        )
        EVEN: tl.constexpr = K % CHUNK_K == 0
        FULL: tl.constexpr = EVEN and 8 % BLOCK_R == 0
        a_at = a_start + (begin + r)[None, :, None] * K + k[:, None, :]
        a = load_inside(a_at, ((begin + r) < stacked)[None, :, None] & (k < K)[:, None, :], FULL)
        x_at = x + source_rows(order, first, True) * x_stride + k
        row = source_rows(order, first + tl.where(rows > 1, 1, 0), True)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            if not BESIDE:
                tl.extra.cuda.gdc_wait()
        out = partials + (chunk * rows_total + first).to(tl.int64) * width + r
        CACHE: tl.constexpr = ".cg" if BESIDE else ""
        x_row = tl.load(x_at, mask=k < K, other=0.0, cache_modifier=CACHE)
        start, m = begin, 0
        while start < stacked:
            m_next = tl.where(m + 1 == rows, 0, m + 1)
            x_next_at = x + row * x_stride + k
            x_next = tl.load(x_next_at, mask=k < K, other=0.0, cache_modifier=CACHE)
            row = source_rows(order, first + tl.where(m_next + 1 == rows, 0, m_next + 1), True)
            products = x_row.to(tl.float32)[:, None, :] * a.to(tl.float32)
            sums = tl.sum(tl.sum(products, axis=0), axis=1)
            tl.store(out + start + m * width, sums, mask=start + r < stacked)
            if m_next == 0:
                start += RANK_BLOCKS * BLOCK_R
                if start < stacked:
                    a_at = a_start + (start + r)[None, :, None] * K + k[:, None, :]
                    inside = ((start + r) < stacked)[None, :, None] & (k < K)[:, None, :]
                    a = load_inside(a_at, inside, FULL)
            m = m_next
            x_row = x_next
    if PDL and chunk + tile + rank_block == 0:
        tl.extra.cuda.gdc_wait()  # one block that waits keeps the next kernel from overtaking


@jit("rows_total", "width", "layers", "layer")
def _shrink_tiles_kernel(
    x, arena, a_offsets, ranks, entries, count, order, partials,
    x_stride, rows_total, width, layers, layer,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr, LAYER_PROJECTIONS: tl.constexpr,
    K: tl.constexpr, CHUNK_K: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: a chunk of K, every num_programs(1)-th tile, every RANK_BLOCKS-th block of ranks.

    It multiplies on the tensor cores, in steps of BLOCK_K.
    """
    chunk = tl.program_id(0)
    rank_block = tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(1), tl.load(count), tl.num_programs(1)):
        slot, first, rows = load_tile(entries, count, tile)
        place = tl.maximum(slot, 0) * layers + layer
        a_start, stacked = stacked_a(
            arena, a_offsets, ranks, place, GROUP, GROUPS, PROJECTION, PROJECTIONS,
            LAYER_PROJECTIONS,
        )  # fmt: skip
        stacked = tl.where(slot < 0, 0, stacked)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        x_rows = x + source_rows(order, first + m, m < rows)[:, None] * x_stride
        out = partials + (chunk * rows_total + first + m).to(tl.int64) * width
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
    if PDL and chunk + tl.program_id(1) + rank_block == 0:
        tl.extra.cuda.gdc_wait()  # as in `_shrink_rows_kernel`


def shrink(
    x: torch.Tensor, adapters: GroupAdapters, rows: LoraRows, *, beside_linear: bool = False
) -> None:
    """workspace[c, t, j] = x[t, chunk c] @ A[j, chunk c], for each row j of t's stacked A.

    Arguments as in `ops.add_lora`.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    require_rows("x", x, (x.shape[0], adapters.in_features))
    require(x.dtype == adapters.arena.dtype, f"x is {x.dtype}, the arena {adapters.arena.dtype}")
    shape, config = cut_rows(x.shape[0], adapters, rows, x.device)
    if not runs_kernel(x):
        reference.shrink(x, adapters, rows)
        return
    launch_shrink(x, adapters, rows, shape, config, beside_linear=beside_linear)


def launch_shrink(
    x: torch.Tensor,
    adapters: GroupAdapters,
    rows: LoraRows,
    shape: Shape,
    config: Config,
    *,
    beside_linear: bool = False,
) -> None:
    """The kernel in one configuration; its arguments were checked."""
    kernel: Any
    options: dict[str, int] = {}
    table, tiles = adapters.table, rows.tiles
    rank_blocks, across = config.rank_blocks, tiles.capacity
    if shape.dot:
        kernel = _shrink_tiles_kernel
        options = {"BLOCK_K": config.shrink_k, "BLOCK_R": config.shrink_r}
        options |= {"BLOCK_M": power_of_two(shape.block_m)}
        across = tile_programs(tiles, x.shape[0])
    elif shrink_fragments.serves(x):
        kernel = shrink_fragments.shrink_kernel
        options = {"BESIDE": beside_linear}
    else:
        kernel = _shrink_rows_kernel
        options = {"BLOCK_K": _ROW_FEATURES, "BLOCK_R": _ROW_RANKS, "BESIDE": beside_linear}
        rank_blocks *= config.shrink_r // _ROW_RANKS
    kernel[(config.chunks(shape), across, rank_blocks)](
        x, adapters.arena, table.a, table.rank, tiles.entries, tiles.count, tiles.order,
        rows.workspace, x.stride(0), x.shape[0], len(shape.out_features) * shape.max_rank,
        table.layers, adapters.layer,
        GROUP=adapters.group, GROUPS=len(table.groups.projections),
        PROJECTIONS=len(shape.out_features), K=shape.in_features, CHUNK_K=config.chunk_k,
        RANK_BLOCKS=rank_blocks, PDL=config.pdl, num_warps=config.shrink_warps,
        num_stages=config.shrink_stages, **adapters.constants, **options, **config.launch_options,
    )  # fmt: skip
