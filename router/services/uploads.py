"""How many uploads a router takes at a time, how fast they must come, what runners can serve."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from granatum.adapters_store.limits import FleetLimits, RunnerLimits
from granatum.v1.adapters_pb2 import UploadAdapterRequest
from granatum.v1.cluster_pb2 import RunnerStatus
from granatum.v1.errors import DeadlineExceeded, Overloaded, Unavailable

MAX_OF_TENANT = 4
MAX_IN_ALL = 64
_FRESH_S = 1.0
_RETRY_AFTER_S = 2.0
_DISCARD_S = 2.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an upload must come."""

    stall_s: float = 30.0
    """The longest wait for the next bytes."""
    grace_s: float = 60.0
    """Seconds after which the average speed counts."""
    bytes_per_s: float = 64 << 10
    """The least average speed."""


class Seats:
    """Uploads under way, by tenant."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, tenant: str) -> Iterator[None]:
        """A seat for one upload. Raises Overloaded."""
        if self._taken[tenant] >= MAX_OF_TENANT:
            raise _full(f"{MAX_OF_TENANT} uploads of yours are under way on this router")
        if self._taken.total() >= MAX_IN_ALL:
            raise _full(f"{MAX_IN_ALL} uploads are under way on this router")
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            self._taken += Counter()  # this forgets tenants without seats


class Fleet:
    """What the fleet's runners can serve, as the registry said at most a second ago."""

    def __init__(self, runners: Callable[[], Awaitable[list[RunnerStatus]]]) -> None:
        self._runners = runners
        self._limits: FleetLimits = ()
        self._asked = float("-inf")
        self._asking = asyncio.Lock()

    async def limits(self) -> FleetLimits:
        """The runners' limits; empty while no runner lives or the registry is away."""
        async with self._asking:
            now = asyncio.get_running_loop().time()
            if now - self._asked > _FRESH_S:
                self._limits = await self._ask()
                self._asked = now
            return self._limits

    async def _ask(self) -> FleetLimits:
        try:
            statuses = await self._runners()
        except Unavailable:
            return ()
        runners = [status.runner for status in statuses]
        return tuple({RunnerLimits(r.max_rank, r.max_adapter_elements) for r in runners})


async def paced(
    requests: AsyncIterator[UploadAdapterRequest], pace: Pace
) -> AsyncIterator[UploadAdapterRequest]:
    """The same messages. Raises DeadlineExceeded once the sender is too slow.

    Only time counts in which we wait for the sender. An empty chunk is no progress.
    """
    clock = asyncio.get_running_loop().time
    waited, waited_since_progress, received = 0.0, 0.0, 0
    while True:
        begun = clock()
        try:
            async with asyncio.timeout(pace.stall_s - waited_since_progress):
                request = await anext(requests)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _slow(f"nothing came for {pace.stall_s:g} s", "UPLOAD_STALLED") from None
        waited += clock() - begun
        waited_since_progress += clock() - begun
        if request.HasField("header") or request.chunk:
            waited_since_progress = 0.0
        received += len(request.chunk)
        if waited > pace.grace_s and received < waited * pace.bytes_per_s:
            raise _slow(
                f"{received:,} bytes came in {waited:.0f} s, less than {pace.bytes_per_s:,.0f} a "
                "second",
                "UPLOAD_SLOW",
            )
        yield request


async def discard(requests: AsyncIterator[UploadAdapterRequest]) -> None:
    """Read for a moment what the sender of a refused upload still sends.

    If a call ends while its client writes, the client sees a broken write and not the refusal.
    """
    with suppress(Exception):  # only the refusal matters to the client
        async with asyncio.timeout(_DISCARD_S):
            async for _ in requests:
                pass


def _slow(what: str, reason: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the upload was given up: {what}; upload again over a faster link",
        reason=reason,
        field="chunk",
    )


def _full(what: str) -> Overloaded:
    return Overloaded(
        f"{what}, the most that it takes: try again when one is done",
        reason="TOO_MANY_UPLOADS",
        retry_after_s=_RETRY_AFTER_S,
    )
