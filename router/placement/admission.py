"""How a sequence gets its runner: at once, or when its turn in the queue comes."""

import asyncio
import random
from collections.abc import Callable, Collection, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from granatum.router.placement import placement
from granatum.router.placement.leases import Leases
from granatum.router.placement.line import Line, Waiter
from granatum.router.placement.placement import (
    Lease,
    LeaseKind,
    Placed,
    PlacementOutcome,
    PlacementRequest,
    Waiting,
)
from granatum.router.placement.registry import Registry
from granatum.v1.errors import (
    RETRY_AFTER_S,
    DeadlineExceeded,
    GranatumError,
    Overloaded,
    PreconditionFailed,
    Unavailable,
)

T = TypeVar("T")

_POLL_S = 0.5
_RETRY_S = 0.2


class Admission:
    """Places sequences. Where there is no room, they wait.

    `unreachable` names the runners that this router cannot reach just now.
    """

    def __init__(
        self, registry: Registry, leases: Leases, unreachable: Callable[[], Collection[str]]
    ) -> None:
        self._registry = registry
        self._leases = leases
        self._unreachable = unreachable
        self._line = Line()
        self._under_way: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Wake waiting sequences whenever there may be room, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._poll())
        finally:
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def claim(self, lease: Lease, give_up: float) -> bool:
        """Claim a name; False if another owner has it. Waits while the registry is away."""
        assert lease.kind is LeaseKind.CLAIM
        try:
            claimed = await self._insist(lambda: self._registry.claim(lease), lease, give_up)
        except TimeoutError:
            raise _deadline_passed() from None
        if claimed:
            self._leases.hold(lease)
        return claimed

    async def admit(self, request: PlacementRequest, give_up: float) -> Placed:
        """Reserve room on a runner, at the latest at `give_up` on the event loop's clock.

        The caller releases the reservation. Raises Overloaded if a bound is reached or no turn
        came, PreconditionFailed if no runner could ever serve the adapter, Unavailable if no runner
        is within reach or the registry is away, and DeadlineExceeded.
        """
        try:
            outcome = await self._attempt(request, give_up)
        except TimeoutError:
            raise _deadline_passed() from None
        if not isinstance(outcome, Placed):
            outcome = await self._stand_in_line(request, _waiting(request, outcome), give_up)
        self._leases.hold(outcome.reservation)
        return outcome

    async def _stand_in_line(
        self, request: PlacementRequest, outcome: Waiting, give_up: float
    ) -> Placed:
        request = replace(request, entry=outcome.entry)
        lease = Lease(LeaseKind.ENTRY, "", outcome.entry)
        self._leases.hold(lease)
        try:
            with self._line.enter(outcome.entry, request) as waiter:
                while await self._turn(waiter, outcome, give_up):
                    attempt = await self._attempt(request, give_up)
                    if isinstance(attempt, Placed):
                        return attempt
                    outcome = _waiting(request, attempt)
        except TimeoutError:
            pass
        finally:
            self._leases.release(lease)
        raise _too_late(outcome)

    async def _turn(self, waiter: Waiter, outcome: Waiting, give_up: float) -> bool:
        """Wait for the next turn and take it. Raises TimeoutError if it does not come in time."""
        waiter.note(outcome)
        self._line.pass_on(waiter)
        async with asyncio.timeout_at(give_up):
            await waiter.turn.wait()
        waiter.turn.clear()
        return True

    async def _attempt(self, request: PlacementRequest, give_up: float) -> PlacementOutcome:
        def place() -> Coroutine[object, object, PlacementOutcome]:
            return self._registry.place(replace(request, unreachable=self._unreachable()))

        brought = Lease(LeaseKind.SEQUENCE, request.entry or "", request.id)
        return await self._insist(place, brought, give_up)

    async def _insist(
        self, call: Callable[[], Coroutine[object, object, T]], brought: Lease, give_up: float
    ) -> T:
        """Call the registry until it answers. Raises TimeoutError or the registry's last failure.

        A call that was sent is never cut off: the registry may have acted already. If nobody waits
        for the answer any more, the call still ends, and what it `brought` is then released.
        """
        clock = asyncio.get_running_loop().time
        task: asyncio.Task[T] | None = None
        failure: Unavailable | None = None
        answered = False
        try:
            while True:
                task = self._begin(call())
                await asyncio.wait({task}, timeout=max(0.0, give_up - clock()))
                if not task.done():
                    raise failure or TimeoutError
                failure = _failure(task)
                if failure is None:
                    answered = True
                    return task.result()
                await _pause(failure, give_up - clock())
        finally:
            if task is not None and not answered:
                self._abandon(task, brought)

    def _begin(self, call: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(call)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def _abandon(self, task: asyncio.Task[T], brought: Lease) -> None:
        def ended(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # which nobody waits for
            self._leases.abandon(brought)

        task.add_done_callback(ended)

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


def _failure(task: asyncio.Task[T]) -> Unavailable | None:
    """Why the registry did not answer; None if it did. Raises any other error."""
    error = task.exception()
    if error is None or isinstance(error, Unavailable):
        return error
    raise error


async def _pause(failure: Unavailable, left_s: float) -> None:
    """Wait before the next try; raise the failure if no time is left for one."""
    pause = _RETRY_S * random.uniform(0.5, 1.5)
    await asyncio.sleep(max(0.0, min(pause, left_s)))
    if left_s <= pause:
        raise failure


def _waiting(request: PlacementRequest, outcome: PlacementOutcome) -> Waiting:
    """The outcome, if the sequence must wait. Any other outcome is raised as its error."""
    match outcome:
        case placement.Full():
            raise Overloaded(
                "every runner is busy and the queue is full (--max-queue): try again later",
                reason="QUEUE_FULL",
                retry_after_s=RETRY_AFTER_S,
            )
        case placement.TenantFull():
            raise Overloaded(
                f"your tenant has {outcome.limit} requests in the queue, as many as it may "
                "(--max-queued-per-tenant): wait for some to run",
                reason="TENANT_QUEUE",
                retry_after_s=RETRY_AFTER_S,
            )
        case placement.Unservable():
            raise _unservable(request, outcome)
        case Placed():
            raise AssertionError("a placement need not wait")
        case _:
            return outcome


def _unservable(request: PlacementRequest, fleet: placement.Unservable) -> PreconditionFailed:
    return PreconditionFailed(
        f"no runner can serve the adapter, of rank {request.rank} and {request.elements:,} "
        f"elements: the fleet's largest take rank {fleet.max_rank} and {fleet.max_elements:,} "
        "elements; upload a smaller one, or ask the operator for a larger runner",
        reason="ADAPTER_NOT_SERVABLE",
        field="adapter",
    )


def _deadline_passed() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline came before a runner was found: give a later one")


def _too_late(outcome: Waiting) -> GranatumError:
    if isinstance(outcome, placement.Capped):
        return Overloaded(
            "your tenant ran as many requests as it may at a time (--max-running-per-tenant) until "
            "the deadline: wait for one to end",
            reason="TENANT_RUNNING",
            retry_after_s=RETRY_AFTER_S,
        )
    if isinstance(outcome, placement.Limited) or (
        isinstance(outcome, placement.Queued) and outcome.live_runners
    ):
        return Overloaded(
            "every runner was busy until the deadline: try again later",
            reason="QUEUE_TIMEOUT",
            retry_after_s=RETRY_AFTER_S,
        )
    return Unavailable(
        "no runner is within reach: try again, and see to the runners if it lasts",
        reason="NO_RUNNER",
        retry_after_s=RETRY_AFTER_S,
    )
