"""CUDA graphs: one per shape of a step, captured once, all in one memory pool."""

import time
from collections.abc import Callable, Iterable

import structlog
import torch

from granatum.runner.model.inputs import DeviceInputs, Step, StepShape

log = structlog.get_logger(__name__)


class Graphs:
    """Steps of known shapes, each replayed by one launch.

    `compute` launches a step and returns its logits, which a graph writes to a fixed address: they
    hold until a graph is replayed again.
    """

    def __init__(self, compute: Callable[[Step], torch.Tensor], inputs: DeviceInputs) -> None:
        self._compute = compute
        self._inputs = inputs
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self, shapes: Iterable[StepShape]) -> None:
        """Capture `shapes`, the largest first, so that the others find its memory in the pool."""
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        for shape in sorted(shapes, key=lambda s: s.rows, reverse=True):
            step = self._inputs.view(shape)
            self._compute(step)  # compiles kernels, which a capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = self._compute(step)
            self._graphs[shape] = (graph, logits)
        seconds = round(time.monotonic() - started, 1)
        log.info("graphs captured", graphs=len(self._graphs), seconds=seconds)

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Run a captured shape on the current stream."""
        graph, logits = self._graphs[shape]
        graph.replay()
        return logits
