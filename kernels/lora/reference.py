"""The torch twins of the LoRA ops: specification, CPU backend, and the tests' second opinion.

Arguments and effects are those of the launchers of the same names.
"""

import torch

from granatum.kernels.layout import (
    FIRST_PROJECTION,
    GROUP_PROJECTIONS,
    AdapterTable,
    Tiles,
)
from granatum.kernels.lora.tuning import Shape, config_for


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
) -> None:
    """As `lora.add_lora`, without partial sums and so without their workspace."""
    for slot, rows in _tile_rows(tiles):
        ranks = _ranks(table, slot, layer, group)
        inner = (
            x[_source_rows(tiles, rows)].float()
            @ _stacked_a(arena, table, slot, layer, group, x.shape[1]).T
        )
        mine = _source_rows(tiles, rows)
        changed = y[mine]
        _add_expanded(changed, inner, ranks, arena, table, slot, layer, group, out_features)
        y[mine] = changed


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
    """As `shrink.shrink`."""
    partials, chunk_k = _partials(
        workspace, x.shape[0], x.shape[1], out_features, table, tiles, x.device
    )
    for slot, rows in _tile_rows(tiles):
        a = _stacked_a(arena, table, slot, layer, group, x.shape[1])
        source = x[_source_rows(tiles, rows)].float()
        for chunk, partial in enumerate(partials):
            k = slice(chunk * chunk_k, (chunk + 1) * chunk_k)
            partial[rows, : a.shape[0]] = source[:, k] @ a[:, k].T


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
    """As `expand.expand`."""
    partials, _ = _partials(
        workspace, y.shape[0], in_features, out_features, table, tiles, y.device
    )
    for slot, rows in _tile_rows(tiles):
        ranks = _ranks(table, slot, layer, group)
        inner = partials[:, rows, : sum(ranks)].sum(0)
        mine = _source_rows(tiles, rows)
        changed = y[mine]
        _add_expanded(changed, inner, ranks, arena, table, slot, layer, group, out_features)
        y[mine] = changed


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
    """As `expand.expand_from`; rows in no tile become the bias as well."""
    y.copy_(torch.zeros_like(y) if bias is None else bias.expand_as(y))
    expand(y, in_features, arena, table, layer, group, out_features, tiles, workspace)


def _tile_rows(tiles: Tiles) -> list[tuple[int, slice]]:
    """Slot and rows of each run of tiles of one adapter."""
    entries: list[list[int]] = tiles.entries[: int(tiles.count)].tolist()
    runs: list[tuple[int, slice]] = []
    for slot, first, rows, _ in entries:
        end = first + rows
        if runs and (runs[-1][0], runs[-1][1].stop) == (slot, first):
            first = runs.pop()[1].start
        if slot >= 0:
            runs.append((slot, slice(first, end)))
    return runs


def _source_rows(tiles: Tiles, rows: slice) -> slice | torch.Tensor:
    """The rows of x and y that are these rows of the tiles' order."""
    return rows if tiles.order is None else tiles.order[rows].long()


def _ranks(table: AdapterTable, slot: int, layer: int, group: int) -> list[int]:
    first = FIRST_PROJECTION[group]
    ranks: list[int] = table.rank[slot, layer, first : first + GROUP_PROJECTIONS[group]].tolist()
    return ranks


def _stacked_a(
    arena: torch.Tensor, table: AdapterTable, slot: int, layer: int, group: int, in_features: int
) -> torch.Tensor:
    """The group's A [R, K] in float32."""
    rank = sum(_ranks(table, slot, layer, group))
    start = int(table.a[slot, layer, group])
    return arena.view(-1)[start : start + rank * in_features].view(rank, in_features).float()


def _add_expanded(
    y: torch.Tensor,
    inner: torch.Tensor,
    ranks: list[int],
    arena: torch.Tensor,
    table: AdapterTable,
    slot: int,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
) -> None:
    """Add scale * inner @ B to the tile's rows of y, projection by projection."""
    first = FIRST_PROJECTION[group]
    slices = torch.split(y, list(out_features), dim=1)
    for p, (out, v) in enumerate(zip(slices, torch.split(inner, ranks, dim=1), strict=True)):
        if ranks[p]:
            start = int(table.b[slot, layer, first + p])
            b = arena.view(-1)[start : start + ranks[p] * out.shape[1]].view(ranks[p], -1)
            scale = float(table.scale[slot, layer, first + p])
            out.copy_(out.float() + scale * (v @ b.float()))


def _partials(
    workspace: torch.Tensor,
    rows: int,
    in_features: int,
    out_features: tuple[int, ...],
    table: AdapterTable,
    tiles: Tiles,
    device: torch.device,
) -> tuple[torch.Tensor, int]:
    """The workspace as [chunks, T, projections * max_rank], and the features of a chunk."""
    shape = Shape(in_features, out_features, table.max_rank, tiles.block_m)
    config = config_for(shape, device)
    used = workspace[: config.workspace_elements(shape, rows)]
    return used.view(config.chunks(shape), rows, -1), config.chunk_k
