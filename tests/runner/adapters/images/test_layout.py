"""Adapters' pieces in their pages."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granatum.adapters_store.format.modules import ModuleSpec
from granatum.models.base_model import BaseModel
from granatum.models.families import LLAMA
from granatum.runner.adapters.images.layout import PIECE_STEP, lay_out

Modules = dict[tuple[int, str], ModuleSpec]


def base_model(layers: int, hidden: int, kv: int, inner: int) -> BaseModel:
    features = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    return BaseModel("test", layers, features, "f" * 64)


LLAMA_7B = base_model(32, 4096, 4096, 11008)
LLAMA_8B = base_model(32, 4096, 1024, 14336)


def everything(base: BaseModel, rank: int) -> Modules:
    return {
        (layer, name): ModuleSpec(rank, 2.0)
        for layer in range(base.num_layers)
        for name in LLAMA.projections
    }


@st.composite
def adapters(draw: st.DrawFn) -> tuple[BaseModel, Modules, int]:
    size = st.integers(1, 12).map(lambda n: 8 * n)
    base = base_model(draw(st.integers(1, 4)), draw(size), draw(size), draw(size))
    keys = [(layer, name) for layer in range(base.num_layers) for name in LLAMA.projections]
    chosen = draw(st.sets(st.sampled_from(keys), min_size=1))
    specs = {key: ModuleSpec(draw(st.integers(1, 40)), draw(st.floats(0, 9))) for key in chosen}
    smallest = 3 * 40 * max(max(sizes) for sizes in base.features.values())
    assert smallest % PIECE_STEP == 0
    return base, specs, smallest * draw(st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(adapters())
def test_pieces_are_whole_apart_and_aligned(case: tuple[BaseModel, Modules, int]) -> None:
    base, modules, page_elements = case
    layout = lay_out(base, modules, page_elements)
    taken = np.zeros((layout.pages, page_elements), np.int8)
    for place in layout.places:
        end = place.offset + place.piece.rows * place.piece.columns
        assert place.offset % PIECE_STEP == 0
        assert end <= page_elements
        taken[place.page, place.offset : end] += 1
    assert taken.max() == 1
    assert taken.any(axis=1).all(), "a page holds nothing"


@settings(max_examples=100, deadline=None)
@given(adapters())
def test_table_row_finds_every_piece(case: tuple[BaseModel, Modules, int]) -> None:
    base, modules, page_elements = case
    layout = lay_out(base, modules, page_elements)
    pages = tuple(7 + 3 * i for i in reversed(range(layout.pages)))
    a, b = layout.row.resolve(pages, page_elements)
    for place in layout.places:
        piece = place.piece
        found = a[piece.layer, piece.group] if piece.group is not None else None
        if piece.projection is not None:
            found = b[piece.layer, piece.projection]
        assert found == pages[place.page] * page_elements + place.offset
    for layer, index in np.ndindex(layout.row.rank.shape):
        spec = modules.get((layer, LLAMA.projections[index]))
        rank = -(-spec.rank // 8) * 8 if spec else 0
        assert layout.row.rank[layer, index] == rank
        assert layout.row.scale[layer, index] == np.float32(spec.scale if spec else 0)


def test_stacked_a_holds_only_the_projections_that_are_there() -> None:
    modules = {(0, "q_proj"): ModuleSpec(5, 1.0), (0, "v_proj"): ModuleSpec(16, 1.0)}
    layout = lay_out(base_model(1, 64, 32, 96), modules, 4096)
    shapes = {(p.piece.group, p.piece.projection): p.piece for p in layout.places}
    assert (shapes[0, None].rows, shapes[0, None].columns) == (24, 64)
    assert (shapes[None, 0].rows, shapes[None, 0].columns) == (8, 64)
    assert (shapes[None, 2].rows, shapes[None, 2].columns) == (16, 32)
    assert len(shapes) == 3


def page_sizes() -> Iterator[tuple[BaseModel, int, int]]:
    for base, kv_elements in ((LLAMA_7B, 2 * 32 * 4096), (LLAMA_8B, 2 * 32 * 1024)):
        for rank in (8, 16, 64):
            yield base, kv_elements * 16, rank


@pytest.mark.parametrize(("base", "page_elements", "rank"), page_sizes())
def test_packing_wastes_little(base: BaseModel, page_elements: int, rank: int) -> None:
    layout = lay_out(base, everything(base, rank), page_elements)
    elements = sum(p.piece.elements for p in layout.places)
    assert layout.pages <= -(-elements // page_elements) + max(1, layout.pages // 20)
