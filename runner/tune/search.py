"""The search: the fastest configuration of each entry, kept in the user's table as it is found."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from granatum.kernels.device import Gpu
from granatum.kernels.tables import tables
from granatum.runner.tune.tasks import FIELDS, Choice, Task

MARGIN = 0.002
"""Share of a step's time by which a configuration must be faster than the best before it."""

Clock = Callable[[Task, Sequence[Choice]], list[float]]
"""Seconds of a step by each configuration, all measured in turn; infinite if one cannot run."""


def pending(wanted: Iterable[Task], folder: Path, gpu: Gpu) -> list[Task]:
    """The entries that the user's tables in `folder` lack.

    Raises:
        ValueError: a file there is no table.
    """
    have = {op: _read(folder, gpu, op) for op in FIELDS}
    return [task for task in wanted if task.size not in have[task.op].get(task.shape, {})]


def search(task: Task, clock: Clock) -> Choice:
    """The fastest configuration: phase by phase, each on top of the best before it."""
    best: Choice = None
    for phase in task.phases:
        tried: list[Choice] = [best]
        tried += [choice for choice in phase(best) if choice != best]
        best = _fastest(tried, clock(task, tried))
    return best


def keep(task: Task, choice: Choice, folder: Path, gpu: Gpu) -> None:
    """Put an entry into the user's table, and have this process use it."""
    tables.put(gpu, task.op, task.shape, task.size, choice)
    shapes = _read(folder, gpu, task.op)
    shapes.setdefault(task.shape, {})[task.size] = choice
    tables.write(tables.user_table(folder, gpu, task.op), gpu, shapes)


def _fastest(tried: Sequence[Choice], seconds: Sequence[float]) -> Choice:
    """The first, unless another one is faster by more than the noise."""
    best = 0
    for index, took in enumerate(seconds):
        if took < seconds[best] * (1 - MARGIN):
            best = index
    return tried[best]


def _read(folder: Path, gpu: Gpu, op: str) -> tables.Shapes:
    path = tables.user_table(folder, gpu, op)
    return tables.read(path, FIELDS[op]) if path.exists() else {}
