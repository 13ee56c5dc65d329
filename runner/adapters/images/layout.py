"""Where an adapter's matrices lie within its pages. No torch.

A piece is the stacked A of one layer's projection group, or one projection's Bᵀ
(docs/architecture.md, "The arena"). Pieces are packed by first-fit decreasing. No piece crosses a
page's end, so the pages need not be adjacent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from granatum.adapters_store.format.modules import Modules, by_projection
from granatum.adapters_store.limits import RANK_STEP, padded_rank
from granatum.models.base_model import BaseModel
from granatum.v1.errors import InvalidAdapter

PIECE_STEP = 64
"""Pieces start at multiples of this many elements: 128 bytes of the smallest dtype we serve."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix that must not be split.

    A stacked A has its group's index in `group`, a Bᵀ its projection's in `projection`.
    """

    layer: int
    group: int | None
    projection: int | None
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Elements up to where the next piece may start."""
        return padded(self.rows * self.columns, PIECE_STEP)


@dataclass(frozen=True, slots=True)
class Place:
    """A piece and where it begins: the adapter's page, and the element within that page."""

    piece: Piece
    page: int
    offset: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """An adapter's row of the adapter table before its pages are known.

    `a_page` and `a_offset` locate each group's A, `[layers, groups]`; `b_page` and `b_offset` each
    projection's Bᵀ, `[layers, projections]`. `rank` (padded, 0: absent) and `scale` are
    `[layers, projections]`.
    """

    a_page: Int32
    a_offset: Int64
    b_page: Int32
    b_offset: Int64
    rank: Int32
    scale: Float32

    def resolve(self, pages: tuple[int, ...], page_elements: int) -> tuple[Int64, Int64]:
        """Element offsets in the arena of A `[layers, groups]` and Bᵀ `[layers, projections]`."""
        start = np.asarray(pages, np.int64) * page_elements
        return start[self.a_page] + self.a_offset, start[self.b_page] + self.b_offset

    def fault(self, base: BaseModel, pages: int, page_elements: int) -> str:
        """What in the row would lead kernels out of the adapter's pages; empty if nothing."""
        if (self.rank < 0).any() or (self.rank % RANK_STEP).any():
            return f"a rank is no multiple of {RANK_STEP}"
        if not np.isfinite(self.scale).all():
            return "a scale is not finite"
        names = base.family.projections
        widths = [base.features[name] for name in names]
        ranks = self.rank.astype(np.int64)
        starts = [names.index(group.projections[0]) for group in base.family.groups]
        stacked = np.add.reduceat(ranks, starts, axis=1)
        a_elements = stacked * np.array([widths[start][0] for start in starts])
        b_elements = ranks * np.array([outputs for _, outputs in widths])
        for page, offset, elements in (
            (self.a_page, self.a_offset, a_elements),
            (self.b_page, self.b_offset, b_elements),
        ):
            if (page < 0).any() or (page >= pages).any():
                return f"a piece lies in a page beyond the {pages} that there are"
            if (offset < 0).any() or (offset % PIECE_STEP).any():
                return f"a piece begins at no multiple of {PIECE_STEP}"
            if (offset > page_elements - elements).any():
                return "a piece goes beyond its page"
        return ""


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """An adapter's pieces, each in its place, and the table row that tells the kernels."""

    pages: int
    places: tuple[Place, ...]
    row: TableRow


def padded(count: int, step: int) -> int:
    """`count` rounded up to a multiple of `step`."""
    return -(-count // step) * step


def lay_out(base: BaseModel, modules: Modules, page_elements: int) -> AdapterLayout:
    """Pack the pieces of an adapter's modules into pages.

    A fused module has the pieces of its projections: each has a copy of the module's A. Raises
    InvalidAdapter if a piece fits no page. Up to the rank for which arena.page_tokens chose the
    pages' size, every piece fits.
    """
    projections = by_projection(modules, base)
    pieces = sorted(_pieces(base, projections), key=_by_size)
    places = _pack(base, pieces, page_elements)
    pages = 1 + max((place.page for place in places), default=0)
    return AdapterLayout(pages, tuple(places), _table_row(base, projections, places))


def _pieces(base: BaseModel, projections: Modules) -> Iterator[Piece]:
    names = base.family.projections
    for layer in sorted({layer for layer, _ in projections}):
        for group, members in enumerate(group.projections for group in base.family.groups):
            present = [name for name in members if (layer, name) in projections]
            ranks = [padded_rank(projections[layer, name].rank) for name in present]
            if not present:
                continue
            yield Piece(layer, group, None, sum(ranks), base.features[present[0]][0])
            for name, rank in zip(present, ranks, strict=True):
                yield Piece(layer, None, names.index(name), rank, base.features[name][1])


def _by_size(piece: Piece) -> tuple[int, int, int, int]:
    """Largest first. The other keys decide ties, so that every runner makes the same image."""
    which = 0 if piece.group is not None else 1
    return (-piece.elements, piece.layer, which, piece.group or piece.projection or 0)


def _pack(base: BaseModel, pieces: list[Piece], page_elements: int) -> list[Place]:
    assert page_elements % PIECE_STEP == 0
    used: list[int] = []
    places = []
    for piece in pieces:
        _check_fits(base, piece, page_elements)
        page = next(
            (i for i, at in enumerate(used) if at + piece.elements <= page_elements), len(used)
        )
        if page == len(used):
            used.append(0)
        places.append(Place(piece, page, used[page]))
        used[page] += piece.elements
    return places


def _check_fits(base: BaseModel, piece: Piece, page_elements: int) -> None:
    if piece.elements <= page_elements:
        return
    if piece.group is not None:
        modules = base.family.groups[piece.group].modules
        what = f"the A matrices of {', '.join(module.name for module in modules)}"
    else:
        what = f"the B matrix of {base.family.projections[piece.projection or 0]}"
    raise InvalidAdapter(
        f"{what} in layer {piece.layer}, of rank {piece.rows} together, have {piece.elements} "
        f"numbers, and this runner's pages hold {page_elements}: train with a lower rank, or "
        "start the runner with a higher --max-rank",
        reason="ADAPTER_TOO_LARGE",
    )


def _table_row(base: BaseModel, projections: Modules, places: list[Place]) -> TableRow:
    names = base.family.projections
    of_a, of_b = (base.num_layers, len(base.family.groups)), (base.num_layers, len(names))
    row = TableRow(
        a_page=np.zeros(of_a, np.int32),
        a_offset=np.zeros(of_a, np.int64),
        b_page=np.zeros(of_b, np.int32),
        b_offset=np.zeros(of_b, np.int64),
        rank=np.zeros(of_b, np.int32),
        scale=np.zeros(of_b, np.float32),
    )
    for place in places:
        layer, group, projection = place.piece.layer, place.piece.group, place.piece.projection
        if group is not None:
            row.a_page[layer, group], row.a_offset[layer, group] = place.page, place.offset
        if projection is not None:
            row.b_page[layer, projection] = place.page
            row.b_offset[layer, projection] = place.offset
    for (layer, name), spec in projections.items():
        row.rank[layer, names.index(name)] = padded_rank(spec.rank)
        row.scale[layer, names.index(name)] = spec.scale
    return row
