"""The torch twins of the LoRA ops: specification, CPU backend, and the tests' second opinion.

Arguments and effects are those of the launchers of the same names.
"""

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.layout import Tiles
from granatum.kernels.lora.tuning import Shape, config_for


def add_lora(y: torch.Tensor, x: torch.Tensor, adapters: GroupAdapters, rows: LoraRows) -> None:
    """As `ops.add_lora`, without partial sums and so without their workspace."""
    for slot, part in _tile_rows(rows.tiles):
        mine = _source_rows(rows.tiles, part)
        inner = x[mine].float() @ _stacked_a(adapters, slot).T
        _add_expanded(y, mine, inner, adapters, slot)


def shrink(x: torch.Tensor, adapters: GroupAdapters, rows: LoraRows) -> None:
    """As `shrink.shrink`."""
    partials, chunk_k = _partials(x.shape[0], adapters, rows)
    for slot, part in _tile_rows(rows.tiles):
        a = _stacked_a(adapters, slot)
        source = x[_source_rows(rows.tiles, part)].float()
        for chunk, partial in enumerate(partials):
            k = slice(chunk * chunk_k, (chunk + 1) * chunk_k)
            partial[part, : a.shape[0]] = source[:, k] @ a[:, k].T


def expand(y: torch.Tensor, adapters: GroupAdapters, rows: LoraRows) -> None:
    """As `expand.expand`."""
    partials, _ = _partials(y.shape[0], adapters, rows)
    for slot, part in _tile_rows(rows.tiles):
        inner = partials[:, part, : sum(_ranks(adapters, slot))].sum(0)
        _add_expanded(y, _source_rows(rows.tiles, part), inner, adapters, slot)


def expand_from(
    bias: torch.Tensor | None, y: torch.Tensor, adapters: GroupAdapters, rows: LoraRows
) -> None:
    """As `expand.expand_from`; rows in no tile become the bias as well."""
    y.copy_(torch.zeros_like(y) if bias is None else bias.expand_as(y))
    expand(y, adapters, rows)


def _tile_rows(tiles: Tiles) -> list[tuple[int, slice]]:
    """Slot and rows of each segment: adjacent tiles of one adapter."""
    entries: list[list[int]] = tiles.entries[: int(tiles.count)].tolist()
    segments: list[tuple[int, slice]] = []
    for slot, first, rows, _ in entries:
        end = first + rows
        if segments and (segments[-1][0], segments[-1][1].stop) == (slot, first):
            first = segments.pop()[1].start
        if slot >= 0:
            segments.append((slot, slice(first, end)))
    return segments


def _source_rows(tiles: Tiles, rows: slice) -> slice | torch.Tensor:
    """The rows of x and y that stand at `rows` in the tiles' order."""
    return rows if tiles.order is None else tiles.order[rows].long()


def _ranks(adapters: GroupAdapters, slot: int) -> list[int]:
    """The rank of each projection of the group."""
    ranks: list[int] = adapters.table.rank[slot, adapters.layer, _projections(adapters)].tolist()
    return ranks


def _projections(adapters: GroupAdapters) -> slice:
    """The group's projections among the layer's."""
    first = adapters.table.groups.first[adapters.group]
    return slice(first, first + len(adapters.out_features))


def _stacked_a(adapters: GroupAdapters, slot: int) -> torch.Tensor:
    """The group's A [R, K] in float32."""
    rank, width = sum(_ranks(adapters, slot)), adapters.in_features
    start = int(adapters.table.a[slot, adapters.layer, adapters.group])
    return adapters.arena.view(-1)[start : start + rank * width].view(rank, width).float()


def _add_expanded(
    y: torch.Tensor,
    mine: slice | torch.Tensor,
    inner: torch.Tensor,
    adapters: GroupAdapters,
    slot: int,
) -> None:
    """Add scale * inner @ B to the rows `mine` of y, projection by projection."""
    changed, ranks, layer = y[mine], _ranks(adapters, slot), adapters.layer
    table, own = adapters.table, _projections(adapters)
    starts, scales = table.b[slot, layer, own].tolist(), table.scale[slot, layer, own].tolist()
    slices = torch.split(changed, list(adapters.out_features), dim=1)
    for p, (out, v) in enumerate(zip(slices, torch.split(inner, ranks, dim=1), strict=True)):
        if ranks[p]:
            end = starts[p] + ranks[p] * out.shape[1]
            b = adapters.arena.view(-1)[starts[p] : end].view(ranks[p], -1)
            out.copy_(out.float() + scales[p] * (v @ b.float()))
    y[mine] = changed


def _partials(rows: int, adapters: GroupAdapters, work: LoraRows) -> tuple[torch.Tensor, int]:
    """The workspace as [chunks, T, projections * max_rank], and the features of a chunk."""
    widths = (adapters.in_features, adapters.out_features)
    shape = Shape(*widths, adapters.table.max_rank, work.tiles.block_m)
    config = config_for(shape, work.workspace.device)
    used = work.workspace[: config.workspace_elements(shape, rows)]
    return used.view(config.chunks(shape), rows, -1), config.chunk_k
