"""Which graph serves a plan, and whether its lists of tiles have room and cover what they must."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from step_plans import LIMITS, plans, span

from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M
from granatum.runner.engine.execution.executor import _shapes
from granatum.runner.engine.execution.graphs import holds
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.model.inputs import FEW_ROWS, HostInputs, StepShape

SHAPES = _shapes(LIMITS)
HOST = HostInputs(LIMITS, pinned=False)


def shape_of(plan: Plan) -> StepShape:
    return next(shape for shape in SHAPES if holds(shape, plan))


def covered(name: str, index: int, block_m: int) -> Iterator[tuple[int, int]]:
    """Row and slot, of each tile's rows."""
    count = HOST._arrays["counts"][index]
    for slot, first, rows, _ in HOST._arrays[name][:count].tolist():
        assert 0 < rows <= block_m
        yield from ((row, slot) for row in range(first, first + rows))


@settings(max_examples=150, deadline=None)
@given(plans())
def test_tiles_have_room_and_cover_every_row(plan: Plan) -> None:
    shape = shape_of(plan)
    HOST.fill(plan, shape, sampling=False)
    slots = [s.sequence.slot for s in plan.spans for _ in range(s.rows)]
    if not shape.lora:
        assert set(slots) <= {-1}
        return
    counts = HOST._arrays["counts"]
    assert counts[0] <= shape.short_tiles
    short = list(covered("short_tiles", 0, DECODE_BLOCK_M))
    assert all(row < shape.short_tiles for row, _ in short)
    if not shape.long_tiles:
        assert short == list(enumerate(slots))
        return
    decodes = len(plan.decodes)
    assert short == list(enumerate(slots[:decodes]))
    assert counts[1] <= shape.long_tiles
    assert list(covered("long_tiles", 1, PREFILL_BLOCK_M)) == list(
        enumerate([-1] * decodes + slots[decodes:])
    )


@pytest.mark.parametrize(
    ("decodes", "chunk", "lora", "expected"),
    [
        (3, 0, False, (4, 4, 0, 0)),
        (3, 0, True, (4, 4, 4, 0)),
        (31, 20, True, (64, 32, 64, 0)),  # few rows: all as decodes go
        (31, 70, True, (128, 32, 32, 35)),
        (31, 240, True, (320, 32, 32, 38)),
        (0, 300, True, (320, 0, 0, 38)),  # alone: nothing for decodes
        (0, 300, False, (320, 0, 0, 0)),
        (31, 481, False, (512, 32, 0, 0)),
    ],
)
def test_the_smallest_shape_that_serves(
    decodes: int, chunk: int, lora: bool, expected: tuple[int, ...]
) -> None:
    slot = 0 if lora else -1
    chunks = (span(31, slot, 0, chunk),) if chunk else ()
    shape = shape_of(Plan(tuple(span(seat, slot, 40, 1) for seat in range(decodes)), chunks))
    assert (shape.rows, shape.decodes, shape.short_tiles, shape.long_tiles) == expected
    assert bool(shape.query_tiles) == bool(chunk)


@pytest.mark.parametrize(
    ("prefill_tokens", "max_batch", "expected"),
    [
        (512, 32, [32, 64, 128, 192, 256, 320, 384, 448, 512]),
        (512, 256, [256, 320, 384, 448, 512]),
        (500, 32, [62, 125, 192, 250, 256, 320, 384, 448, 500]),
        (64, 8, [32, 64]),
        (16, 16, [16]),
    ],
)
def test_rows_of_steps_with_chunks(
    prefill_tokens: int, max_batch: int, expected: list[int]
) -> None:
    shapes = _shapes(EngineLimits(max_batch, 0, prefill_tokens, 16, 600))
    mixed = [shape for shape in shapes if shape.query_tiles]
    assert np.unique([shape.rows for shape in mixed]).tolist() == expected
    assert all(bool(s.long_tiles) == (s.lora and s.rows > FEW_ROWS) for s in mixed)
