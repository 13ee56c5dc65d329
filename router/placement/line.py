"""This router's part of the queue: its waiting sequences in the queue's order, and their turns."""

import asyncio
import bisect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from granatum.router.placement.placement import Capped, Limited, PlacementRequest, Waiting


@dataclass(order=True, slots=True)
class Waiter:
    """One waiting sequence. Its event `turn` says: try now."""

    entry: str
    request: PlacementRequest = field(compare=False)
    turn: asyncio.Event = field(default_factory=asyncio.Event, compare=False)
    obstacle: Hashable = field(default=None, compare=False)
    """Why it stood aside at its last try. Others with the same obstacle need not try after it."""

    def note(self, outcome: Waiting) -> None:
        """Remember the outcome of the last try."""
        match outcome:
            case Capped():
                self.obstacle = self._cap
            case Limited():
                self.obstacle = self._limits
            case _:
                self.obstacle = None

    def meets(self, obstacles: set[Hashable]) -> bool:
        """Whether one of these obstacles, which stopped others, stops this one too."""
        return self._cap in obstacles or self._limits in obstacles

    @property
    def _cap(self) -> Hashable:
        return self.request.tenant

    @property
    def _limits(self) -> Hashable:
        return (self.request.rank, self.request.elements)


class Line:
    """Lets the first one try. The next one may try only if the first one stands aside."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    @contextmanager
    def enter(self, entry: str, request: PlacementRequest) -> Iterator[Waiter]:
        """Wait in line. At the end the next one may try."""
        waiter = Waiter(entry, request)
        bisect.insort(self._waiters, waiter)
        try:
            yield waiter
        finally:
            self._waiters.remove(waiter)
            self.call()

    def call(self) -> None:
        """Let the first one try."""
        if self._waiters:
            self._waiters[0].turn.set()

    def pass_on(self, waiter: Waiter) -> None:
        """If `waiter` stands aside, give a turn to the next that meets no earlier obstacle."""
        if waiter.obstacle is None:
            return
        obstacles: set[Hashable] = set()
        for other in self._waiters:
            if other > waiter and not other.meets(obstacles):
                other.turn.set()
                return
            if other.obstacle is not None:
                obstacles.add(other.obstacle)
