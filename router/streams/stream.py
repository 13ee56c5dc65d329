"""The life of one stream: place, submit, relay, and place again when its runner gives it back."""

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from granatum.router.placement.admission import Admission
from granatum.router.placement.leases import Leases
from granatum.router.placement.placement import Lease, LeaseKind, Placed, PlacementRequest
from granatum.router.placement.registry import Registry
from granatum.router.streams.deadline import Deadline
from granatum.router.streams.progress import Progress
from granatum.router.streams.remote_sequence import RemoteSequence, SessionLost, Unread
from granatum.router.streams.request import AcceptedRequest
from granatum.router.streams.session import RunnerSessions
from granatum.router.streams.setbacks import FailedLoads, Setbacks, error_of
from granatum.v1.errors import AlreadyExists, DeadlineExceeded, Unavailable
from granatum.v1.inference_pb2 import GenerateResponse
from granatum.v1.runner_pb2 import DEPARTURE_LOAD_FAILED, Departure, SequenceOutput

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long streams wait, in seconds."""

    placement_s: float
    """The wait for a runner, if the client set no deadline."""
    stall_s: float
    """The wait for news, before the registry is asked whether the runner is alive."""
    idle_s: float
    """The wait for news from a runner that is alive."""


class Streams:
    """Opens streams, and holds what all streams of this router share."""

    def __init__(
        self,
        router_id: str,
        registry: Registry,
        leases: Leases,
        admission: Admission,
        sessions: RunnerSessions,
        patience: Patience,
    ) -> None:
        self.router_id = router_id
        self.registry = registry
        self.leases = leases
        self.admission = admission
        self.sessions = sessions
        self.patience = patience
        self.failed_loads = FailedLoads()
        self._numbers = itertools.count(1)

    def open(self, request: AcceptedRequest, deadline: Deadline) -> "Stream":
        """The stream of a request."""
        return Stream(self, f"{self.router_id}.{next(self._numbers)}", request, deadline)


class Stream:
    """One request on its way through as many runners as it takes."""

    def __init__(
        self, shared: Streams, id_: str, request: AcceptedRequest, deadline: Deadline
    ) -> None:
        self._shared = shared
        self._id = id_
        self._request = request
        self._deadline = deadline
        self._clock = asyncio.get_running_loop().time
        self._progress = Progress(request, arrived=deadline.arrived)
        self._entry: str | None = None
        self._setbacks = Setbacks()

    async def responses(self) -> AsyncGenerator[GenerateResponse]:
        """Everything for the client, from the first token to the end.

        Closing it early ends the sequence on its runner and frees its room.
        """
        claim = await self._claim() if self._request.named else None
        try:
            over = False
            while not over:
                await asyncio.sleep(self._setbacks.longest_delay * random.uniform(0.5, 1.0))
                placed = await self._place()
                async with aclosing(self._relay(placed)) as responses:
                    async for response in responses:
                        yield response
                        over = response.HasField("end")
        finally:
            if claim is not None:
                self._shared.leases.release(claim)

    async def _claim(self) -> Lease:
        name = f"{self._request.tenant}/{self._request.request_id}"
        lease = Lease(LeaseKind.CLAIM, name, self._id)
        if not await self._shared.admission.claim(lease, self._give_up()):
            raise AlreadyExists(
                f"a request with the id {self._request.request_id!r} is running: wait for its "
                "end, or give this one another request_id",
                field="request_id",
                # By then the registry has forgotten the claim of a router that died.
                retry_after_s=self._shared.registry.terms.lease_s,
            )
        return lease

    async def _place(self) -> Placed:
        now = self._clock()
        ill = self._shared.failed_loads.runners(self._request.adapter_digest, now)
        wanted = PlacementRequest(
            id=f"{self._id}.{self._progress.placements}",
            tokens=self._progress.tokens_to_hold,
            priority=self._request.message.priority,
            entry=self._entry,
            admitted=self._progress.placements > 0,
            avoid=sorted(ill | self._setbacks.avoided(now)),
            tenant=self._request.tenant,
            adapter=bool(self._request.adapter_digest),
            rank=self._request.rank,
            elements=self._request.elements,
        )
        placed = await self._shared.admission.admit(wanted, self._give_up())
        self._entry = placed.entry
        return placed

    async def _relay(self, placed: Placed) -> AsyncGenerator[GenerateResponse]:
        """What one runner has to say, until it is done with the sequence."""
        runner_id = placed.runner_id

        def release() -> None:
            self._shared.leases.release(placed.reservation)

        try:
            submission = self._progress.submission(self._clock(), self._setbacks.suspicion)
            sequence = self._shared.sessions.submit(runner_id, placed.address, submission, release)
            async with aclosing(self._responses_of(sequence, runner_id)) as responses:
                async for response in responses:
                    yield response
        except SessionLost as lost:
            self._setbacks.lost(runner_id, self._clock(), alone=lost.alone)
            self._note(runner_id, "lost")
        except Unread:
            # The sequence queues anew. With its old place, a client that reads now and then would
            # overtake all others each time.
            self._entry = None
            self._note(runner_id, "unread")
        finally:
            release()

    async def _responses_of(
        self, sequence: RemoteSequence, runner_id: str
    ) -> AsyncGenerator[GenerateResponse]:
        try:
            over = False
            while not over:
                news = await self._receive(sequence, runner_id)
                over = news[-1].WhichOneof("outcome") is not None
                if sequence.prompt is not None:
                    self._request.fix_prompt(sequence.prompt)
                    sequence.prompt = None
                response = self._progress.absorb(news, runner_id, self._clock())
                if response.tokens:
                    self._setbacks.progressed()
                if response.tokens or response.HasField("end"):
                    yield response
                if over:
                    self._follow(news[-1], runner_id)
        finally:
            sequence.cancel()

    async def _receive(self, sequence: RemoteSequence, runner_id: str) -> list[SequenceOutput]:
        quiet_until = self._clock() + self._shared.patience.idle_s
        while True:
            try:
                return await sequence.receive(self._shared.patience.stall_s)
            except TimeoutError:
                if not await self._alive(runner_id):
                    raise SessionLost from None
                if self._clock() > quiet_until:
                    raise DeadlineExceeded(
                        f"the runner {runner_id} made no token for "
                        f"{self._shared.patience.idle_s:g} s: try again",
                    ) from None

    async def _alive(self, runner_id: str) -> bool:
        try:
            return await self._shared.registry.alive(runner_id)
        except Unavailable:
            return True  # nobody knows, and the session to the runner still stands

    def _follow(self, last: SequenceOutput, runner_id: str) -> None:
        """Raise the outcome's error, or remember which runner to avoid."""
        if last.HasField("failed"):
            raise error_of(last.failed)
        if last.HasField("departed"):
            now = self._clock()
            if last.departed == DEPARTURE_LOAD_FAILED:
                self._shared.failed_loads.note(runner_id, self._request.adapter_digest, now)
            self._note(runner_id, Departure.Name(last.departed))
            self._setbacks.departed(runner_id, last, now)

    def _note(self, runner_id: str, cause: str) -> None:
        log.info(
            "sequence left its runner",
            sequence=self._id,
            tenant=self._request.tenant,
            request=self._request.request_id,
            runner=runner_id,
            cause=cause,
            tokens=len(self._progress.tokens),
        )

    def _give_up(self) -> float:
        """When to stop waiting for a runner, on the event loop's clock."""
        return self._deadline.give_up(self._shared.patience.placement_s)
