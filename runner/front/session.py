"""One router's session: the router's commands in, news of its sequences out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import structlog

from granatum.runner.front.adapter_chats import ChatAway
from granatum.runner.front.outbox import Outbox
from granatum.runner.front.outcomes import set_outcome
from granatum.runner.front.submission import Prepared
from granatum.runner.records import Departure, Failure, Finish, SequenceNews, Submit
from granatum.runner.text.sequence_text import SequenceText
from granatum.v1.errors import GranatumError, Internal
from granatum.v1.inference_pb2 import Token, TokenIds
from granatum.v1.runner_pb2 import (
    SequenceOutput,
    SessionRequest,
    SessionResponse,
    SubmitSequence,
)

LIFE_S = 1.0
"""The longest time without a message to a router."""
SILENT_S = 10.0
"""A router that says nothing for this long is gone; a live one pings every second."""
STUCK_S = 30.0
"""A router that takes no message for this long does not read."""
UNREAD_BYTES = 64 << 20
"""The most that may wait for a router that does not read."""
_OUR_FAULT = "the runner failed on this request: try again; its operators find why in its log"

log = structlog.get_logger(__name__)


class EngineAway(Exception):
    """No engine can take a sequence just now."""


class EngineAccess(Protocol):
    """What a session needs of the engine, which has sequence ids of its own."""

    async def prepare(self, message: SubmitSequence) -> Prepared:
        """Tokenize and check; raises GranatumError, EngineAway or ChatAway."""
        ...

    def submit(self, prepared: Prepared, session: "RouterSession") -> None:
        """Run a sequence; its news go to `session.take`. Raises EngineAway."""
        ...

    def cancel(self, engine_id: int) -> None:
        """Forget a sequence."""
        ...


@dataclass(slots=True)
class _Running:
    """A sequence in the engine."""

    id: int
    """The router's."""
    prompt_tokens: int
    """0: the router was told."""
    text: SequenceText
    submit: Submit
    prompt: TokenIds | None
    """The prompt's ids, until the router was told."""


@dataclass(slots=True)
class _Patience:
    """How long a router has been silent, and how long a message has waited to be read.

    Both are counted in turns of our own event loop. While this process stands still, the router
    cannot be heard, so that time does not count against it.
    """

    silent_s: float = 0.0
    stuck_s: float = 0.0
    writing: bool = False


class RouterSession:
    """The sequences of one router.

    News that come while a message is being written go with the next message. An error in one
    sequence ends that sequence alone.
    """

    def __init__(self, engine: EngineAccess) -> None:
        self._engine = engine
        self._running: dict[int, _Running] = {}  # by the engine's id
        self._preparing: dict[int, asyncio.Task[None]] = {}  # by the router's id
        self._tasks: set[asyncio.Task[None]] = set()  # of `_preparing`, and cancelled ones
        self._outbox = Outbox()
        self._news = asyncio.Event()
        self._patience = _Patience()
        self._over = False

    async def follow(self, commands: AsyncIterator[SessionRequest]) -> None:
        """Obey the router until it ends the stream."""
        try:
            async for command in commands:
                self._patience.silent_s = 0.0
                self._obey(command)
        finally:
            self.end()

    async def responses(self) -> AsyncIterator[SessionResponse]:
        """Messages for the router until the session ends; an empty one is a sign of life."""
        while not self._over or self._outbox:
            if not self._outbox:
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIFE_S):
                        await self._news.wait()
                if self._over and not self._outbox:
                    return
            self._patience.writing, self._patience.stuck_s = True, 0.0
            yield self._outbox.take()
            self._patience.writing = False

    async def neglected(self) -> str:
        """Wait until the router no longer speaks, or no longer reads; says which."""
        patience, turn_s = self._patience, LIFE_S / 4
        while True:
            await asyncio.sleep(turn_s)
            patience.silent_s += turn_s
            patience.stuck_s += turn_s if patience.writing else 0.0
            if patience.silent_s >= SILENT_S:
                return "the router is silent"
            if patience.stuck_s >= STUCK_S or self._outbox.size > UNREAD_BYTES:
                return "the router does not read"

    def take(self, news: SequenceNews) -> None:
        """News of one sequence from the engine."""
        sequence = self._running.get(news.sequence_id)
        if sequence is None:
            return
        try:
            self._take(news, sequence)
        except Exception as error:
            log.error("taking a sequence's news", sequence=news.sequence_id, exc_info=error)
            if self._running.pop(news.sequence_id, None) and news.outcome is None:
                self._engine.cancel(news.sequence_id)
            self._fail(sequence.id, Internal(_OUR_FAULT))

    def end(self) -> None:
        """The router is gone, or the runner stops: cancel the router's sequences."""
        self._over = True
        self._news.set()
        for task in self._tasks:
            task.cancel()
        for engine_id in self._running:
            self._engine.cancel(engine_id)
        self._running.clear()

    async def ended(self) -> None:
        """After `end`: wait for the tasks of the session."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _obey(self, command: SessionRequest) -> None:
        match command.WhichOneof("command"):
            case "submit":
                self._submit(command.submit)
            case "cancel":
                self._cancel(command.cancel.sequence_id)
            case _:  # a ping, or what a newer router says
                pass

    def _submit(self, message: SubmitSequence) -> None:
        if self._over:
            return
        number = message.sequence_id
        if number in self._preparing or any(s.id == number for s in self._running.values()):
            log.error("two sequences of one id", sequence=number)
            self._cancel(number)
            self._fail(number, Internal(_OUR_FAULT))
            return
        task = asyncio.create_task(self._begin(message))
        self._preparing[number] = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self, message: SubmitSequence) -> None:
        number = message.sequence_id
        try:
            prepared = await self._engine.prepare(message)
            self._run(number, prepared)
        except GranatumError as error:
            self._fail(number, error)
        except EngineAway:
            set_outcome(self._output(number), Departure.REFUSED)
        except ChatAway as error:
            cause = Failure.of(error.cause)
            set_outcome(self._output(number), Departure.LOAD_FAILED, cause)
        except Exception as error:
            log.error("beginning a sequence", sequence=number, exc_info=error)
            self._fail(number, Internal(_OUR_FAULT))
        finally:
            if self._preparing.get(number) is asyncio.current_task():
                del self._preparing[number]

    def _run(self, sequence_id: int, prepared: Prepared) -> None:
        prompt_tokens = len(prepared.submit.prompt)
        if prepared.text.stopped:  # another runner had made a stop string complete
            set_outcome(self._output(sequence_id, (), prompt_tokens), Finish.STOP)
            return
        self._engine.submit(prepared, self)
        sequence = _Running(
            sequence_id, prompt_tokens, prepared.text, prepared.submit, prepared.prompt
        )
        self._running[prepared.submit.sequence_id] = sequence

    def _cancel(self, sequence_id: int) -> None:
        self._outbox.discard(sequence_id)
        task = self._preparing.pop(sequence_id, None)
        if task is not None:
            task.cancel()
        for engine_id, sequence in self._running.items():
            if sequence.id == sequence_id:
                del self._running[engine_id]
                self._engine.cancel(engine_id)
                return

    def _take(self, news: SequenceNews, sequence: _Running) -> None:
        finish = news.outcome if isinstance(news.outcome, Finish) else None
        tokens = sequence.text.take(news.tokens, news.logprobs, finish)
        if sequence.text.stopped:
            self._stop(news, sequence, tokens)
            return
        output = self._output(sequence.id, tokens, sequence.prompt_tokens, sequence.prompt)
        sequence.prompt_tokens, sequence.prompt = 0, None
        if news.outcome is not None:
            del self._running[news.sequence_id]
            set_outcome(output, news.outcome, news.cause)
            if news.outcome in (Departure.SUSPECTED, Departure.BLAMED):
                _log_suspect(sequence, news.outcome)

    def _stop(self, news: SequenceNews, sequence: _Running, tokens: Sequence[Token]) -> None:
        """A stop string has appeared: the sequence is complete, even if the engine goes on."""
        del self._running[news.sequence_id]
        set_outcome(self._output(sequence.id, tokens, sequence.prompt_tokens), Finish.STOP)
        if news.outcome is None:
            self._engine.cancel(news.sequence_id)

    def _fail(self, sequence_id: int, error: GranatumError) -> None:
        set_outcome(self._output(sequence_id), Failure.of(error))

    def _output(
        self,
        sequence_id: int,
        tokens: Sequence[Token] = (),
        prompt_tokens: int = 0,
        prompt: TokenIds | None = None,
    ) -> SequenceOutput:
        """The sequence's part of the next message, with `tokens` added."""
        self._news.set()
        return self._outbox.add(sequence_id, tokens, prompt_tokens, prompt)


def _log_suspect(sequence: _Running, verdict: Departure | Finish | Failure) -> None:
    submit = sequence.submit
    log.error(
        "the engine failed in a step with this sequence",
        sequence=sequence.id,
        verdict=str(verdict),
        adapter=submit.adapter,
        prompt_tokens=len(submit.prompt),
        suspicion=submit.suspicion,
        sampling=str(submit.sampling),
    )
