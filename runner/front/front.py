"""The front's side of the engine: sequences of all sessions go in, and their news come out."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from granatum.runner.channel import AsyncChannel, ChannelClosed
from granatum.runner.front.adapter_chats import AdapterChats
from granatum.runner.front.intake import Intake
from granatum.runner.front.session import EngineAway, RouterSession
from granatum.runner.front.submission import Prepared, SequenceBounds
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
from granatum.v1.errors import Unavailable
from granatum.v1.runner_pb2 import SubmitSequence

_STALE_S = 3.0
"""The longest silence of an idle engine, which reports twice a second."""
_STALE_STEPS = 4
"""Longest silence of a computing engine, as a multiple of `Ready.step_s`."""


class Front:
    """Hands sequences of all sessions to the engine, and the engine's news back to the sessions.

    The front outlives its engines. `run` carries the news of one engine until that engine is gone.
    `lose` then tells the engine's sequences so, and `attach` brings the next engine.
    """

    def __init__(
        self,
        channel: AsyncChannel[Command, Report],
        tokenizer: Tokenizer,
        vocabulary: int,
        chats: AdapterChats | None = None,
    ) -> None:
        self._channel = channel
        self._intake = Intake(tokenizer, vocabulary, chats)
        self._sessions: dict[int, RouterSession] = {}  # by the engine's sequence id
        self._open: set[RouterSession] = set()
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
        """Set while there is an engine that was ready."""
        self.draining = False

    @property
    def ready(self) -> Ready:
        """What the last engine that was ready said of itself. Unavailable if there was none yet."""
        if self._ready is None:
            raise _loading()
        return self._ready

    @property
    def serving(self) -> bool:
        """Whether there is an engine that computes."""
        return self.loaded.is_set() and not self._hung

    @property
    def bounds(self) -> SequenceBounds:
        """What a sequence may be on this runner. Raises as `ready`."""
        return SequenceBounds.of(self.ready, self._intake.vocabulary)

    @property
    def figures(self) -> EngineFigures:
        """The engine's latest figures. Raises as `ready`."""
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
        """Take in reports until the engine is gone. Returns its last word, if it had one."""
        while True:
            try:
                report = await self._channel.receive()
            except ChannelClosed:
                return None
            if isinstance(report, EngineFault):
                return report
            self._take(report)

    def lose(self, departure_of: Callable[[int], Departure]) -> None:
        """The engine is gone: its sequences depart.

        `departure_of` says how, by the engine's id of a sequence.
        """
        self.loaded.clear()
        self._reported, self._hung, self.resident = None, False, ()
        self._channel.close()
        self._depart(departure_of)

    def hang(self) -> None:
        """The engine is silent: its sequences depart, and it gets no others.

        An engine that goes on after all finds its sequences cancelled, and serves again.
        """
        self._hung = True
        lost = tuple(self._sessions)
        self._depart(lambda _: Departure.ENGINE_LOST)
        for engine_id in lost:
            self._channel.send(Cancel(engine_id))

    def open(self) -> RouterSession:
        """A session for one router. Raises Unavailable while the first engine loads."""
        if self._ready is None:
            raise _loading()
        session = RouterSession(self)
        self._open.add(session)
        return session

    def close(self, session: RouterSession) -> None:
        """End a session and cancel its sequences."""
        session.end()
        self._open.discard(session)

    async def prepare(self, message: SubmitSequence) -> Prepared:
        """Tokenize and check a submission. Raises InvalidRequest or EngineAway."""
        if not self.serving:
            raise EngineAway
        self._last_id += 1
        return await self._intake.prepare(self._last_id, message, self.bounds)

    def submit(self, prepared: Prepared, session: RouterSession) -> None:
        """Run a sequence; its news go to `session`. Raises EngineAway."""
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
        """Have the engine give its sequences back and refuse new ones, or have it serve again."""
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
        """End every session; the routers place the sequences again."""
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


def _loading() -> Unavailable:
    return Unavailable("the runner is loading its model: try again", retry_after_s=1.0)
