"""Prepares submissions; long ones in threads, so that they hold up nobody else's streams."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import structlog

from granatum.runner.front.submission import Prepared, SequenceBounds, prepare
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.runner_pb2 import SubmitSequence

INLINE_BYTES = 2048
"""Submissions up to this size are prepared on the event loop, larger ones in a thread."""
INLINE_GENERATED = 64
"""The most generated tokens of a submission that is prepared on the loop.

Each token is made text again, which takes 30 us.
"""
LONG_BYTES = 128 << 10
"""Submissions from this size on share one thread, so that a flood of them takes one core."""

log = structlog.get_logger(__name__)


class Intake:
    """Tokenizes and checks what routers submit, for a model of `vocabulary` tokens."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._middle = ThreadPoolExecutor(2, "submission")
        self._long = ThreadPoolExecutor(1, "long submission")
        beyond = sorted(tokenizer.end_ids - tokenizer.ends_within(vocabulary))
        if beyond:
            log.warning(
                "the model names end tokens that it lacks: they end nothing",
                ids=beyond,
                vocabulary=vocabulary,
            )

    async def prepare(
        self, sequence_id: int, message: SubmitSequence, bounds: SequenceBounds
    ) -> Prepared:
        """Tokenize and check a submission. Raises InvalidRequest."""
        size = message.ByteSize()
        if size <= INLINE_BYTES and len(message.generated) <= INLINE_GENERATED:
            return prepare(sequence_id, message, self._tokenizer, bounds)
        threads = self._long if size >= LONG_BYTES else self._middle
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            threads, prepare, sequence_id, message, self._tokenizer, bounds
        )

    def close(self) -> None:
        """Begin no more submissions; those that have begun end by themselves."""
        for threads in (self._middle, self._long):
            threads.shutdown(wait=False, cancel_futures=True)
