"""The front's side of the engine, and the service that routers call."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import structlog

from granatum.runner.channel import AsyncChannel, ChannelClosed
from granatum.runner.front.intake import Intake
from granatum.runner.front.session import EngineAway, Session
from granatum.runner.front.submission import Bounds, Prepared
from granatum.runner.records import (
    Cancel,
    Command,
    Departure,
    EngineFault,
    EngineFigures,
    Ready,
    Report,
    SequenceNews,
    SetDraining,
    StepReport,
    Stop,
)
from granatum.runner.text.tokenizer import Tokenizer
from granatum.service.cluster_key import check_cluster_key
from granatum.v1.errors import Unavailable
from granatum.v1.runner_pb2 import SessionRequest, SessionResponse, SubmitSequence
from granatum.v1.runner_pb2_grpc import RunnerServiceServicer
from granatum.v1.transport import bearer_of

_STALE_S = 3.0
"""An idle engine reports twice a second."""
_STALE_STEPS = 4
"""And one that computes after each step; the largest takes `Ready.step_s`."""

_FLUSH_S = 1.0
"""For the last messages of a session that ends."""

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Front:
    """Hands sequences of all sessions to the engine, and its news back to them.

    It outlives its engines. `run` carries the news of one until that one is gone; `lose` then says
    so to its sequences, and `attach` brings the next engine.
    """

    def __init__(
        self, channel: AsyncChannel[Command, Report], tokenizer: Tokenizer, vocabulary: int
    ) -> None:
        self._channel = channel
        self._intake = Intake(tokenizer, vocabulary)
        self._sessions: dict[int, Session] = {}  # by the engine's sequence id
        self._open: set[Session] = set()
        self._last_id = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ready: Ready | None = None
        self._figures: EngineFigures | None = None
        self._reported: float | None = None
        self._hung = False
        self.resident: tuple[str, ...] = ()
        """Digests of the adapters on the device."""
        self.loaded = asyncio.Event()
        """Set when the engine is ready; what is read of it before raises Unavailable."""
        self.draining = False

    @property
    def ready(self) -> Ready:
        """What the engine said of itself when it was ready; if it is gone, the one before."""
        if self._ready is None:
            raise _loading()
        return self._ready

    @property
    def serving(self) -> bool:
        """Whether there is an engine that computes."""
        return self.loaded.is_set() and not self._hung

    @property
    def bounds(self) -> Bounds:
        """What this runner can hold."""
        return Bounds.of(self.ready, self._intake.vocabulary)

    @property
    def figures(self) -> EngineFigures:
        """The engine's latest."""
        return self._figures or self.ready.figures

    def is_stale(self) -> bool:
        """Whether the engine is ready and has not reported for longer than any step takes."""
        if self._reported is None or not self.loaded.is_set():
            return False
        silent_s = time.monotonic() - self._reported
        return silent_s > max(_STALE_S, _STALE_STEPS * self.ready.step_s)

    def attach(self, channel: AsyncChannel[Command, Report]) -> None:
        """Serve with a new engine, in place of one that was lost."""
        self._channel = channel
        if self.draining:
            channel.send(SetDraining(True))

    async def run(self) -> EngineFault | None:
        """Take in reports until the engine is gone; its last word, if it had one."""
        while True:
            try:
                report = await self._channel.receive()
            except ChannelClosed:
                return None
            if isinstance(report, EngineFault):
                return report
            self._take(report)

    def lose(self, departure_of: Callable[[int], Departure]) -> None:
        """The engine is gone: each sequence departs as `departure_of` says of its engine's id."""
        self.loaded.clear()
        self._reported, self._hung, self.resident = None, False, ()
        self._channel.close()
        self._depart(departure_of)

    def hang(self) -> None:
        """The engine says nothing: its sequences depart, and it gets no others.

        Should it go on, it finds them cancelled, and serves again.
        """
        self._hung = True
        lost = tuple(self._sessions)
        self._depart(lambda _: Departure.ENGINE_LOST)
        for engine_id in lost:
            self._channel.send(Cancel(engine_id))

    def open(self) -> Session:
        """A session for one router. Raises Unavailable while the first engine loads."""
        if self._ready is None:
            raise _loading()
        session = Session(self)
        self._open.add(session)
        return session

    def close(self, session: Session) -> None:
        """End a session and cancel what it still runs."""
        session.end()
        self._open.discard(session)

    async def prepare(self, message: SubmitSequence) -> Prepared:
        """Tokenize and check a submission. Raises InvalidRequest or EngineAway."""
        if not self.serving:
            raise EngineAway
        self._last_id += 1
        return await self._intake.prepare(self._last_id, message, self.bounds)

    def submit(self, prepared: Prepared, session: Session) -> None:
        """Run a sequence, whose news go to `session`. Raises EngineAway."""
        if not self.serving:
            raise EngineAway
        self._channel.send(prepared.submit)
        self._sessions[prepared.submit.sequence_id] = session
        self._idle.clear()

    def cancel(self, engine_id: int) -> None:
        """Forget a sequence."""
        self._forget(engine_id)
        self._channel.send(Cancel(engine_id))

    def set_draining(self, draining: bool) -> None:
        """Have the engine give back what it has and refuse what comes, or end that."""
        if draining != self.draining:
            self.draining = draining
            self._channel.send(SetDraining(draining))

    async def drain(self, grace_s: float) -> None:
        """Give every sequence back to its router, then end the sessions."""
        self.set_draining(True)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        self.end_sessions()

    def stop(self) -> None:
        """Ask the engine to end, and prepare nothing more."""
        self._channel.send(Stop())
        self.loaded.clear()
        self._intake.close()

    def end_sessions(self) -> None:
        """End every session; routers place again what was left."""
        for session in tuple(self._open):
            self.close(session)

    def _take(self, report: Ready | StepReport) -> None:
        self._reported, self._hung = time.monotonic(), False
        self._figures = report.figures
        if isinstance(report, Ready):
            self._ready = report
            self.loaded.set()
            return
        if report.resident is not None:
            self.resident = report.resident
        for news in report.news:
            self._tell(news)

    def _depart(self, departure_of: Callable[[int], Departure]) -> None:
        for engine_id in tuple(self._sessions):
            self._tell(SequenceNews(engine_id, outcome=departure_of(engine_id)))

    def _tell(self, news: SequenceNews) -> None:
        session = self._sessions.get(news.sequence_id)
        if session is not None:
            session.take(news)
        if news.outcome is not None:
            self._forget(news.sequence_id)

    def _forget(self, engine_id: int) -> None:
        self._sessions.pop(engine_id, None)
        if not self._sessions:
            self._idle.set()


class RunnerService(RunnerServiceServicer):
    """RunnerService over a front. Every call needs the cluster key."""

    def __init__(self, front: Front, cluster_key: str) -> None:
        self._front = front
        self._key = cluster_key

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[SessionRequest], context: Context
    ) -> AsyncIterator[SessionResponse]:
        """One router's session."""
        self._check_key(context)
        session = self._front.open()
        commands = asyncio.create_task(session.follow(request_iterator))
        guard = asyncio.create_task(_guard(self._front, session, asyncio.current_task()))
        try:
            async for response in session.responses():
                yield response
        finally:
            self._front.close(session)
            commands.cancel()
            guard.cancel()
            await asyncio.gather(commands, guard, session.ended(), return_exceptions=True)

    def _check_key(self, context: Context) -> None:
        key = bearer_of(context.invocation_metadata()) or ""
        check_cluster_key(key, self._key)


async def _guard(front: Front, session: Session, call: "asyncio.Task[Any] | None") -> None:
    """End the session of a router that does not speak or read.

    Its call ends with it. A call that is in the middle of a message which nobody reads would
    never end; it is cut.
    """
    log.warning("session ended", why=await session.neglected())
    front.close(session)
    await asyncio.sleep(_FLUSH_S)
    assert call is not None
    call.cancel()


def _loading() -> Unavailable:
    return Unavailable("the runner is loading its model: try again", retry_after_s=1.0)
