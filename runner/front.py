"""The front's side of the engine, and the service that routers call."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from granatum.runner.channel import AsyncChannel
from granatum.runner.records import (
    Cancel,
    Command,
    EngineFault,
    EngineFigures,
    Ready,
    Report,
    SetDraining,
    Stop,
)
from granatum.runner.session import Session
from granatum.runner.submission import Bounds, Prepared, prepare
from granatum.runner.tokenizer import Tokenizer
from granatum.v1.errors import Unauthenticated, Unavailable
from granatum.v1.runner_pb2 import SessionRequest, SessionResponse, SubmitSequence
from granatum.v1.runner_pb2_grpc import RunnerServiceServicer
from granatum.v1.transport import bearer_of

INLINE_BYTES = 4096
"""Submissions up to this size are tokenized at once, longer ones in a thread."""

Context = grpc.aio.ServicerContext[Any, Any]


class Front:
    """Hands sequences of all sessions to the engine, and its news back to them.

    `run` carries the news; it ends with ChannelClosed when the engine is gone.
    """

    def __init__(
        self, channel: AsyncChannel[Command, Report], tokenizer: Tokenizer, vocabulary: int
    ) -> None:
        self._channel = channel
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._sessions: dict[int, Session] = {}  # by the engine's sequence id
        self._open: set[Session] = set()
        self._last_id = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ready: Ready | None = None
        self._figures: EngineFigures | None = None
        self._reported: float | None = None
        self.resident: tuple[str, ...] = ()
        """Digests of the adapters on the device."""
        self.loaded = asyncio.Event()
        """Set when the engine is ready; what is read of it before raises Unavailable."""
        self.draining = False

    @property
    def ready(self) -> Ready:
        """What the engine said of itself when it was ready."""
        if self._ready is None:
            raise Unavailable("the runner is loading its model: try again", retry_after_s=1.0)
        return self._ready

    @property
    def bounds(self) -> Bounds:
        """What this runner can hold."""
        return Bounds.of(self.ready, self._vocabulary)

    @property
    def figures(self) -> EngineFigures:
        """The engine's latest."""
        return self._figures or self.ready.figures

    def age_s(self) -> float | None:
        """Seconds since the engine's last sign of life; None before the first."""
        return None if self._reported is None else time.monotonic() - self._reported

    async def run(self) -> None:
        """Take in reports until the engine is gone."""
        try:
            while True:
                self._take(await self._channel.receive())
        finally:
            self.end_sessions()

    def open(self) -> Session:
        """A session for one router. Raises Unavailable while the engine loads."""
        assert self.ready
        session = Session(self)
        self._open.add(session)
        return session

    def close(self, session: Session) -> None:
        """End a session and cancel what it still runs."""
        session.end()
        self._open.discard(session)

    async def prepare(self, message: SubmitSequence) -> Prepared:
        """Tokenize and check a submission. Raises InvalidRequest."""
        self._last_id += 1
        arguments = (self._last_id, message, self._tokenizer, self.bounds)
        if message.ByteSize() <= INLINE_BYTES:
            return prepare(*arguments)
        return await asyncio.to_thread(prepare, *arguments)

    def submit(self, prepared: Prepared, session: Session) -> None:
        """Run a sequence, whose news go to `session`."""
        self._sessions[prepared.submit.sequence_id] = session
        self._idle.clear()
        self._channel.send(prepared.submit)

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
        """Ask the engine to end."""
        self._channel.send(Stop())

    def end_sessions(self) -> None:
        """End every session; routers place again what was left."""
        for session in tuple(self._open):
            self.close(session)

    def _take(self, report: Report) -> None:
        if isinstance(report, EngineFault):
            return
        self._reported = time.monotonic()
        self._figures = report.figures
        if isinstance(report, Ready):
            self._ready = report
            self.loaded.set()
            return
        if report.resident is not None:
            self.resident = report.resident
        for news in report.news:
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
        self._key = cluster_key.encode()

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[SessionRequest], context: Context
    ) -> AsyncIterator[SessionResponse]:
        """One router's session."""
        self._check_key(context)
        session = self._front.open()
        commands = asyncio.create_task(session.follow(request_iterator))
        try:
            async for response in session.responses():
                yield response
        finally:
            commands.cancel()
            self._front.close(session)

    def _check_key(self, context: Context) -> None:
        key = bearer_of(context.invocation_metadata()) or ""
        if not hmac.compare_digest(key.encode(), self._key):
            raise Unauthenticated(
                "this is not the cluster key: set the same GRANATUM_CLUSTER_KEY everywhere"
            )
