"""How a sequence gets its runner: at once, or after its turn in the queue."""

import asyncio
import bisect
import random
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from granatum.router.leases import Leases
from granatum.router.placement import (
    Full,
    Lease,
    LeaseKind,
    Placed,
    PlacementRequest,
    Queued,
    Unreachable,
)
from granatum.router.registry import Registry
from granatum.v1.errors import GranatumError, Overloaded, Unavailable

T = TypeVar("T")

_POLL_S = 0.5
_RETRY_S = 0.2
_RETRY_AFTER_S = 1.0


@dataclass(order=True, slots=True)
class Waiter:
    """One who stands in line, and the event that says: try."""

    entry: str
    turn: asyncio.Event = field(default_factory=asyncio.Event, compare=False)


class Line:
    """This router's part of the queue, in the queue's order. Only the first one tries."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    @contextmanager
    def enter(self, entry: str) -> Iterator[Waiter]:
        """Stand in line; whoever leaves lets the next one try."""
        waiter = Waiter(entry)
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


class Admission:
    """Places sequences, and has them wait where there is no room.

    `unreachable` names the runners that this router cannot reach just now.
    """

    def __init__(
        self, registry: Registry, leases: Leases, unreachable: Callable[[], Collection[str]]
    ) -> None:
        self._registry = registry
        self._leases = leases
        self._unreachable = unreachable
        self._line = Line()

    @property
    def waiting(self) -> int:
        """How many of this router's sequences wait."""
        return len(self._line)

    async def run(self) -> None:
        """Wake those who wait whenever there may be room, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._poll())

    async def claim(self, lease: Lease, give_up: float) -> bool:
        """Claim a name, waiting for the registry if need be; False if it is taken."""
        assert lease.kind is LeaseKind.CLAIM
        claimed = await _insist(lambda: self._registry.claim(lease), give_up)
        if claimed:
            self._leases.hold(lease)
        return claimed

    async def admit(self, request: PlacementRequest, give_up: float) -> Placed:
        """A runner with room reserved, by `give_up` (of the event loop's clock) at the latest.

        The caller releases the reservation. Raises Overloaded if the queue is full or no turn
        came, Unavailable if there is no runner within reach or the registry is away.
        """
        outcome = await self._attempt(request, give_up)
        if isinstance(outcome, Full):
            raise Overloaded(
                "every runner is busy and the queue is full: try again later",
                reason="QUEUE_FULL",
                retry_after_s=_RETRY_AFTER_S,
            )
        if not isinstance(outcome, Placed):
            outcome = await self._stand_in_line(request, outcome, give_up)
        self._leases.hold(outcome.reservation)
        return outcome

    async def _stand_in_line(
        self, request: PlacementRequest, outcome: Queued | Unreachable, give_up: float
    ) -> Placed:
        request = replace(request, entry=outcome.entry)
        lease = Lease(LeaseKind.ENTRY, "", outcome.entry)
        try:
            with self._line.enter(outcome.entry) as waiter:
                while True:
                    # Where only unreachable runners have room, its entry must block nobody else's.
                    keep = (
                        self._leases.hold if isinstance(outcome, Queued) else self._leases.release
                    )
                    keep(lease)
                    if not await _comes(waiter.turn, give_up):
                        raise _too_late(outcome)
                    attempt = await self._attempt(request, give_up)
                    if isinstance(attempt, Placed):
                        return attempt
                    assert not isinstance(attempt, Full)
                    outcome = attempt
        finally:
            self._leases.release(lease)

    async def _attempt(
        self, request: PlacementRequest, give_up: float
    ) -> Placed | Queued | Unreachable | Full:
        return await _insist(
            lambda: self._registry.place(replace(request, avoid=self._unreachable())), give_up
        )

    async def _listen(self) -> None:
        while True:
            try:
                async with aclosing(self._registry.news()) as news:
                    async for _ in news:
                        self._line.call()
            except Unavailable:
                await asyncio.sleep(_POLL_S)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            self._line.call()


async def _comes(turn: asyncio.Event, give_up: float) -> bool:
    """Wait for the turn and take it; False if it does not come in time."""
    try:
        async with asyncio.timeout_at(give_up):
            await turn.wait()
    except TimeoutError:
        return False
    turn.clear()
    return True


async def _insist(call: Callable[[], Awaitable[T]], give_up: float) -> T:
    """Call until the registry answers, or raise Unavailable when it is time to give up."""
    error: Unavailable | None = None
    try:
        async with asyncio.timeout_at(give_up):
            while True:
                try:
                    return await call()
                except Unavailable as away:
                    error = away
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))
    except TimeoutError:
        raise error or Unavailable(
            "the registry did not answer in time: try again", retry_after_s=_RETRY_AFTER_S
        ) from None


def _too_late(outcome: Queued | Unreachable) -> GranatumError:
    if isinstance(outcome, Queued) and outcome.live_runners:
        return Overloaded(
            "every runner was busy until the deadline: try again later",
            reason="QUEUE_TIMEOUT",
            retry_after_s=_RETRY_AFTER_S,
        )
    return Unavailable(
        "no runner is within reach: try again, and see to the runners if it lasts",
        reason="NO_RUNNER",
        retry_after_s=_RETRY_AFTER_S,
    )
