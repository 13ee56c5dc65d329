"""Where an adapter's matrices lie within its pages. No torch.

A piece is the stacked A of one layer's projection group, or one projection's Bᵀ
(docs/architecture.md, "The arena"). Pieces are packed into as few pages as first-fit decreasing
needs, none across a page's end, so that the pages need not be adjacent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from granatum.adapters_store.format.peft_config import ModuleSpec
from granatum.adapters_store.limits import RANK_STEP
from granatum.models.base_model import GROUPS, PROJECTIONS, BaseModel
from granatum.v1.errors import InvalidAdapter

PIECE_STEP = 64
"""Pieces start at multiples of this many elements: 128 bytes of the smallest dtype we serve."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix that must not be split: `group` names a stacked A, `projection` a Bᵀ."""

    layer: int
    group: int | None
    projection: int | None
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Space it takes, rounded up to where the next piece may start."""
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

    `page` and `offset` locate each group's A `[layers, 4]` and each projection's Bᵀ `[layers, 7]`;
    `rank` (padded, 0: absent) and `scale` are `[layers, 7]`.
    """

    a_page: Int32
    a_offset: Int64
    b_page: Int32
    b_offset: Int64
    rank: Int32
    scale: Float32

    def resolve(self, pages: tuple[int, ...], page_elements: int) -> tuple[Int64, Int64]:
        """Element offsets in the arena of A `[layers, 4]` and Bᵀ `[layers, 7]`."""
        start = np.asarray(pages, np.int64) * page_elements
        return start[self.a_page] + self.a_offset, start[self.b_page] + self.b_offset

    def fault(self, base: BaseModel, pages: int, page_elements: int) -> str:
        """What would lead the kernels out of the adapter's pages; empty if nothing does."""
        if (self.rank < 0).any() or (self.rank % RANK_STEP).any():
            return f"a rank is no multiple of {RANK_STEP}"
        if not np.isfinite(self.scale).all():
            return "a scale is not finite"
        widths = [base.features[name] for name in PROJECTIONS]
        ranks = self.rank.astype(np.int64)
        starts = [PROJECTIONS.index(names[0]) for names in GROUPS.values()]
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


def lay_out(
    base: BaseModel, modules: Mapping[tuple[int, str], ModuleSpec], page_elements: int
) -> AdapterLayout:
    """Pack the pieces of an adapter's modules, by (layer, projection), into pages.

    Raises InvalidAdapter if a piece fits no page; none is so large up to the rank for which
    arena.page_tokens chose the pages' size.
    """
    places = _pack(sorted(_pieces(base, modules), key=_by_size), page_elements)
    pages = 1 + max((place.page for place in places), default=0)
    return AdapterLayout(pages, tuple(places), _table_row(base, modules, places))


def _pieces(base: BaseModel, modules: Mapping[tuple[int, str], ModuleSpec]) -> Iterator[Piece]:
    for layer in sorted({layer for layer, _ in modules}):
        for group, projections in enumerate(GROUPS.values()):
            present = [name for name in projections if (layer, name) in modules]
            ranks = [padded(modules[layer, name].rank, RANK_STEP) for name in present]
            if not present:
                continue
            yield Piece(layer, group, None, sum(ranks), base.features[present[0]][0])
            for name, rank in zip(present, ranks, strict=True):
                yield Piece(layer, None, PROJECTIONS.index(name), rank, base.features[name][1])


def _by_size(piece: Piece) -> tuple[int, int, int, int]:
    """Largest first; the rest makes the order, and so the image, the same everywhere."""
    which = 0 if piece.group is not None else 1
    return (-piece.elements, piece.layer, which, piece.group or piece.projection or 0)


def _pack(pieces: list[Piece], page_elements: int) -> list[Place]:
    assert page_elements % PIECE_STEP == 0
    used: list[int] = []
    places = []
    for piece in pieces:
        _check_fits(piece, page_elements)
        page = next(
            (i for i, at in enumerate(used) if at + piece.elements <= page_elements), len(used)
        )
        if page == len(used):
            used.append(0)
        places.append(Place(piece, page, used[page]))
        used[page] += piece.elements
    return places


def _check_fits(piece: Piece, page_elements: int) -> None:
    if piece.elements <= page_elements:
        return
    if piece.group is not None:
        what = f"the A matrices of {', '.join(list(GROUPS.values())[piece.group])}"
    else:
        what = f"the B matrix of {PROJECTIONS[piece.projection or 0]}"
    raise InvalidAdapter(
        f"{what} in layer {piece.layer}, of rank {piece.rows} together, have {piece.elements} "
        f"numbers, and this runner's pages hold {page_elements}: train with a lower rank, or "
        "start the runner with a higher --max-rank",
        reason="ADAPTER_TOO_LARGE",
    )


def _table_row(
    base: BaseModel, modules: Mapping[tuple[int, str], ModuleSpec], places: list[Place]
) -> TableRow:
    groups, projections = (base.num_layers, len(GROUPS)), (base.num_layers, len(PROJECTIONS))
    row = TableRow(
        a_page=np.zeros(groups, np.int32),
        a_offset=np.zeros(groups, np.int64),
        b_page=np.zeros(projections, np.int32),
        b_offset=np.zeros(projections, np.int64),
        rank=np.zeros(projections, np.int32),
        scale=np.zeros(projections, np.float32),
    )
    for place in places:
        layer, group, projection = place.piece.layer, place.piece.group, place.piece.projection
        if group is not None:
            row.a_page[layer, group], row.a_offset[layer, group] = place.page, place.offset
        if projection is not None:
            row.b_page[layer, projection] = place.page
            row.b_offset[layer, projection] = place.offset
    for (layer, name), module in modules.items():
        row.rank[layer, PROJECTIONS.index(name)] = padded(module.rank, RANK_STEP)
        row.scale[layer, PROJECTIONS.index(name)] = module.scale
    return row
