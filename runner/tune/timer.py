"""The clock of the search: steps in CUDA graphs, the configurations in turn."""

import math
import statistics
from collections.abc import Mapping, Sequence

import structlog
import torch

from granatum.kernels.device import Gpu
from granatum.kernels.tables import tables
from granatum.runner.model.decoder import Model
from granatum.runner.model.inputs import Step
from granatum.runner.tune.rig import Rig, geometric_mean, loads, same
from granatum.runner.tune.tasks import Choice, Task

TURNS = 15
"""Replays of each graph: in turn, so that all of them meet the same clock rates of the GPU."""

Graph = tuple[Model, torch.cuda.CUDAGraph]
"""A captured step, with the model that holds the memory which the step writes."""

log = structlog.get_logger(__name__)


class StepTimer:
    """Times the rig's steps by the configurations that it is asked about."""

    def __init__(self, rig: Rig, gpu: Gpu) -> None:
        self._rig = rig
        self._gpu = gpu

    def __call__(self, task: Task, tried: Sequence[Choice]) -> list[float]:
        """Seconds of a step by each configuration: the geometric mean over the task's steps.

        Infinite where a configuration cannot run on this GPU, or computes something else than the
        first one.
        """
        times: dict[int, list[float]] = {index: [] for index in range(len(tried))}
        for load in loads(task, self._rig.max_rank):
            step = self._rig.fill(load)
            found = _in_turn(self._capture_all(task, {i: tried[i] for i in times}, step))
            times = {index: [*times[index], seconds] for index, seconds in found.items()}
        return [
            geometric_mean(times[index]) if index in times else math.inf
            for index in range(len(tried))
        ]

    def _capture_all(self, task: Task, tried: Mapping[int, Choice], step: Step) -> dict[int, Graph]:
        """The step by each configuration that can run and computes what the first one does."""
        graphs: dict[int, Graph] = {}
        expected: torch.Tensor | None = None
        for index, choice in tried.items():
            try:
                graph, logits = self._capture(task, choice, step)
            except Exception as error:
                torch.cuda.synchronize()  # raises if the device is of no more use
                log.debug("a configuration cannot run", choice=choice, error=str(error))
                continue
            expected = logits if expected is None else expected
            if same(logits, expected):
                graphs[index] = graph
        return graphs

    def _capture(self, task: Task, choice: Choice, step: Step) -> tuple[Graph, torch.Tensor]:
        """The step by a configuration as a graph, and its logits; compiles kernels."""
        tables.put(self._gpu, task.op, task.shape, task.size, choice)
        try:
            model = self._rig.model()
            logits = self._rig.forward(model, step).clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # a pool for all would end with a capture that fails
                self._rig.forward(model, step)
        finally:
            tables.remove(self._gpu, task.op, task.shape, task.size)
        return (model, graph), logits


def _in_turn(graphs: Mapping[int, Graph]) -> dict[int, float]:
    """Seconds of each graph: the median of its replays."""
    times: dict[int, list[float]] = {index: [] for index in graphs}
    for _ in range(TURNS):
        for index, (_, graph) in graphs.items():
            times[index].append(_replay_s(graph))
    return {index: statistics.median(seconds) for index, seconds in times.items()}


def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
