"""How a LoRA op's work is cut into blocks, and what its kernels are launched with."""

from collections.abc import Sequence

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.backend import require_rows
from granatum.kernels.device import Gpu
from granatum.kernels.layout import Tiles
from granatum.kernels.lora.tuning import Config, Shape, config_for

_USUAL_SEGMENTS = 4
"""Segments of one adapter in a usual step with long tiles; a segment's last tile is not full."""


def cut_rows(
    rows: int, adapters: GroupAdapters, work: LoraRows, device: torch.device
) -> tuple[Shape, Config]:
    """The shape of a call on `rows` rows, and how it is cut into blocks.

    Raises:
        ValueError: the workspace is too small.
    """
    widths = (adapters.in_features, adapters.out_features)
    shape = Shape(*widths, adapters.table.max_rank, work.tiles.block_m)
    config = config_for(shape, device)
    config.require_workspace(work.workspace, shape, rows)
    return shape, config


def cut_expand(y: torch.Tensor, adapters: GroupAdapters, rows: LoraRows) -> tuple[Shape, Config]:
    """As `cut_rows`, for an expand into y.

    Raises:
        ValueError: naming what the expand cannot take.
    """
    require_rows("y", y, (y.shape[0], sum(adapters.out_features)))
    return cut_rows(y.shape[0], adapters, rows, y.device)


def expand_arguments(adapters: GroupAdapters, rows: LoraRows) -> tuple[torch.Tensor | None, ...]:
    """The tensors that every expand reads: B, where it lies, the tiles and the partial sums."""
    table, tiles = adapters.table, rows.tiles
    b = (adapters.arena, table.b, table.rank, table.scale)
    return (*b, tiles.entries, tiles.count, tiles.order, rows.workspace)


def tile_programs(tiles: Tiles, rows: int) -> int:
    """Blocks across long tiles. A block takes one tile, or several in turn if there are many.

    Spare blocks cost more than a few turns.
    """
    return min(tiles.capacity, rows // tiles.block_m + _USUAL_SEGMENTS)


def fitting_span(span: int, least: int, outs: Sequence[int], across: int, fewest: int) -> int:
    """Columns that a block goes through: fewer where there are few rows, to fill the GPU.

    The number of columns changes no sum.
    """
    while span > least and blocks_across(outs, span) * across < fewest:
        span //= 2
    return span


def fewest_blocks(gpu: Gpu) -> int:
    """Blocks of long tiles that keep a GPU busy: one per multiprocessor, to a multiple of 32."""
    return gpu.sms // 32 * 32


def blocks_across(outs: Sequence[int], span: int) -> int:
    """Blocks of `span` columns that cover every projection."""
    return sum(-(-n // span) for n in outs)
