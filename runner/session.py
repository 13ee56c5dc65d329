"""One router's session: its commands in, one message per engine step out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from granatum.runner.records import Departure, Failure, Finish, SequenceNews
from granatum.runner.sequence_text import SequenceText
from granatum.runner.submission import Prepared
from granatum.v1 import inference_pb2, runner_pb2
from granatum.v1.errors import GranatumError, Internal
from granatum.v1.inference_pb2 import Token
from granatum.v1.runner_pb2 import (
    SequenceFailure,
    SequenceOutput,
    SessionRequest,
    SessionResponse,
    SubmitSequence,
)

log = structlog.get_logger(__name__)

_FINISHED = {
    Finish.STOP: inference_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_DEPARTED = {
    Departure.REFUSED: runner_pb2.DEPARTURE_REFUSED,
    Departure.EVICTED: runner_pb2.DEPARTURE_EVICTED,
    Departure.DRAINED: runner_pb2.DEPARTURE_DRAINED,
    Departure.ENGINE_LOST: runner_pb2.DEPARTURE_ENGINE_LOST,
    Departure.SUSPECTED: runner_pb2.DEPARTURE_SUSPECTED,
    Departure.BLAMED: runner_pb2.DEPARTURE_BLAMED,
    Departure.LOAD_FAILED: runner_pb2.DEPARTURE_LOAD_FAILED,
}


class Engine(Protocol):
    """What a session needs of the engine; sequences have ids of the engine's own."""

    async def prepare(self, message: SubmitSequence) -> Prepared:
        """Tokenize and check; raises GranatumError."""
        ...

    def submit(self, prepared: Prepared, session: "Session") -> None:
        """Run a sequence, whose news then go to `session.take`."""
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
    text: SequenceText


class Session:
    """Sequences of one router. What comes while a message is being written goes with the next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[int, _Running] = {}  # by the engine's id
        self._preparing: dict[int, asyncio.Task[None]] = {}  # by the router's id
        self._outputs: dict[int, SequenceOutput] = {}
        self._news = asyncio.Event()
        self._over = False

    async def follow(self, commands: AsyncIterator[SessionRequest]) -> None:
        """Obey the router until it ends the stream."""
        try:
            async for command in commands:
                if command.WhichOneof("command") == "submit":
                    self._submit(command.submit)
                elif command.WhichOneof("command") == "cancel":
                    self._cancel(command.cancel.sequence_id)
        finally:
            self.end()

    async def responses(self) -> AsyncIterator[SessionResponse]:
        """What there is to tell the router, until the session ends."""
        while not self._over or self._outputs:
            if self._outputs:
                outputs, self._outputs = self._outputs, {}
                yield SessionResponse(outputs=outputs.values())
            else:
                self._news.clear()
                await self._news.wait()

    def take(self, news: SequenceNews) -> None:
        """News of one sequence from the engine."""
        sequence = self._running.get(news.sequence_id)
        if sequence is None:
            return
        finish = news.outcome if isinstance(news.outcome, Finish) else None
        tokens = sequence.text.take(news.tokens, news.logprobs, finish)
        if sequence.text.stopped:
            self._stop(news, sequence, tokens)
            return
        output = self._output(sequence.id, tokens, sequence.prompt_tokens)
        sequence.prompt_tokens = 0  # said once
        if news.outcome is not None:
            del self._running[news.sequence_id]
            _set_outcome(output, news.outcome)

    def end(self) -> None:
        """The router is gone, or we are: its sequences are cancelled."""
        self._over = True
        self._news.set()
        for task in self._preparing.values():
            task.cancel()
        for engine_id in self._running:
            self._engine.cancel(engine_id)
        self._running.clear()

    def _submit(self, message: SubmitSequence) -> None:
        task = asyncio.create_task(self._begin(message))
        self._preparing[message.sequence_id] = task
        task.add_done_callback(lambda _: self._preparing.pop(message.sequence_id, None))

    async def _begin(self, message: SubmitSequence) -> None:
        try:
            prepared = await self._engine.prepare(message)
        except GranatumError as error:
            self._fail(message.sequence_id, error)
        except Exception as error:
            log.error("preparing a sequence", exc_info=error)
            self._fail(message.sequence_id, Internal(f"the request cannot be prepared: {error}"))
        else:
            self._run(message.sequence_id, prepared)

    def _run(self, sequence_id: int, prepared: Prepared) -> None:
        prompt_tokens = len(prepared.submit.prompt)
        if prepared.text.stopped:  # a stop string was complete before it came here
            output = self._output(sequence_id, [], prompt_tokens)
            _set_outcome(output, Finish.STOP)
            return
        sequence = _Running(sequence_id, prompt_tokens, prepared.text)
        self._running[prepared.submit.sequence_id] = sequence
        self._engine.submit(prepared, self)

    def _cancel(self, sequence_id: int) -> None:
        self._outputs.pop(sequence_id, None)
        task = self._preparing.get(sequence_id)
        if task is not None:
            task.cancel()
        for engine_id, sequence in self._running.items():
            if sequence.id == sequence_id:
                del self._running[engine_id]
                self._engine.cancel(engine_id)
                return

    def _stop(self, news: SequenceNews, sequence: _Running, tokens: list[Token]) -> None:
        """A stop string has appeared: the sequence is complete, whatever the engine thinks."""
        del self._running[news.sequence_id]
        output = self._output(sequence.id, tokens, sequence.prompt_tokens)
        _set_outcome(output, Finish.STOP)
        if news.outcome is None:
            self._engine.cancel(news.sequence_id)

    def _fail(self, sequence_id: int, error: GranatumError) -> None:
        output = self._output(sequence_id, [], 0)
        _set_outcome(output, Failure(error.code, error.message, error.reason))

    def _output(self, sequence_id: int, tokens: list[Token], prompt_tokens: int) -> SequenceOutput:
        """The sequence's part of the next message, with `tokens` added."""
        output = self._outputs.setdefault(sequence_id, SequenceOutput(sequence_id=sequence_id))
        output.tokens.extend(tokens)
        output.prompt_tokens = output.prompt_tokens or prompt_tokens
        self._news.set()
        return output


def _set_outcome(output: SequenceOutput, outcome: Finish | Departure | Failure) -> None:
    match outcome:
        case Finish():
            output.finished = _FINISHED[outcome]
        case Departure():
            output.departed = _DEPARTED[outcome]
        case Failure(code=code, message=message, reason=reason):
            failure = SequenceFailure(code=code, message=message, reason=reason)
            output.failed.CopyFrom(failure)
