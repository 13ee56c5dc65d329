"""Which steps have a CUDA graph, and when the next one is captured.

A runner serves as soon as a few graphs cover every plan by padding. The engine captures the others
between steps, in its own thread.
"""

import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import structlog

from granatum.runner.engine.scheduling.plan import Plan
from granatum.runner.model.inputs import StepShape

INTERVAL_S = 2.0
"""Least seconds between two captures while sequences run."""
SHARE = 0.05
"""The most of such an interval that a capture may take; longer captures wait for an idle engine."""

log = structlog.get_logger(__name__)

GraphT = TypeVar("GraphT")


class Graphs(Generic[GraphT]):
    """Graphs of `shapes`, which hold every plan and are given smallest first.

    `capture` makes the start-up graphs, which cover every plan. The largest comes first, so that
    the others reuse its memory. `capture_later` makes a graph while the engine serves.
    """

    def __init__(
        self,
        capture: Callable[[StepShape], GraphT],
        capture_later: Callable[[StepShape], GraphT],
        shapes: Iterable[StepShape],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capture_later = capture_later
        self._shapes = tuple(shapes)
        self._clock = clock
        self._graphs: dict[StepShape, GraphT] = {}
        self._captured = 0.0
        self._cost = 0.0
        first = covering(self._shapes)
        for shape in sorted(first, key=lambda s: s.rows, reverse=True):
            self._keep(shape, capture)
        self._waiting = [shape for shape in self._shapes if shape not in first]
        self._wanted: StepShape | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __getitem__(self, shape: StepShape) -> GraphT:
        return self._graphs[shape]

    @property
    def waiting(self) -> int:
        """Graphs that are still to be captured."""
        return len(self._waiting)

    def shape_for(self, plan: Plan) -> StepShape:
        """The smallest captured shape that holds `plan`."""
        fitting = (shape for shape in self._shapes if holds(shape, plan))
        smallest = next(fitting)
        if smallest in self._graphs:
            return smallest
        self._wanted = smallest
        return next(shape for shape in fitting if shape in self._graphs)

    def due(self, *, idle: bool) -> bool:
        """Whether the next graph should be captured now; `idle`: no sequence waits for a step."""
        if not self._waiting or idle:
            return bool(self._waiting)
        waited = self._clock() - self._captured
        return waited >= INTERVAL_S and self._cost <= SHARE * INTERVAL_S

    def capture_next(self) -> None:
        """Capture the shape that a plan lacked last, or else the smallest one without a graph.

        An error ends all captures, and is raised. The graphs that there are still serve every plan.
        """
        shape = self._wanted if self._wanted in self._waiting else self._waiting[0]
        self._waiting.remove(shape)
        try:
            self._keep(shape, self._capture_later)
        except Exception:
            self._waiting.clear()
            raise
        if not self._waiting:
            log.info("all graphs captured", graphs=len(self))

    def _keep(self, shape: StepShape, capture: Callable[[StepShape], GraphT]) -> None:
        started = self._clock()
        self._graphs[shape] = capture(shape)
        self._captured = self._clock()
        self._cost = max(self._cost, self._captured - started)


def holds(shape: StepShape, plan: Plan) -> bool:
    """Whether a step of `shape` can compute `plan`."""
    if shape.rows < plan.rows or shape.decodes < len(plan.decodes):
        return False
    return shape.lora >= plan.lora and bool(shape.query_tiles) >= bool(plan.chunks)


def covering(shapes: Iterable[StepShape]) -> set[StepShape]:
    """A few of `shapes` that together hold every plan that any shape holds.

    These are, for steps with adapters and for steps without: the largest shape with chunks, and
    the largest and the smallest shape of decodes alone.
    """
    shapes, found = tuple(shapes), set[StepShape]()
    for lora in (False, True):
        alone = [s for s in shapes if s.lora == lora and not s.query_tiles]
        mixed = [s for s in shapes if s.lora == lora and s.query_tiles]
        found |= {min(alone, key=_size), max(alone, key=_size), max(mixed, key=_size)}
    return found


def _size(shape: StepShape) -> tuple[int, int]:
    return shape.rows, shape.decodes
