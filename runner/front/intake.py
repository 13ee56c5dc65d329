"""Prepares submissions; long ones in threads, so that they hold up nobody else's streams."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from granatum.adapters_store.chat import ChatSettings
from granatum.runner.front.adapter_chats import AdapterChats
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

    def __init__(
        self, tokenizer: Tokenizer, vocabulary: int, chats: AdapterChats | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self._chats = chats
        self._tokenizer = tokenizer
        self._middle = ThreadPoolExecutor(2, "submission")
        self._long = ThreadPoolExecutor(1, "long submission")
        self._foreign = ThreadPoolExecutor(1, "template of an adapter")
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
        """Tokenize and check a submission. Raises InvalidRequest or ChatAway."""
        own = ChatSettings()
        if message.adapter_chat and self._chats is not None:
            own = await self._chats.get(message.adapter_digest, message.adapter_chat)
        threads = self._threads(message, own)
        work = partial(prepare, sequence_id, message, self._tokenizer, bounds, own)
        if threads is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def _threads(self, message: SubmitSequence, own: ChatSettings) -> ThreadPoolExecutor | None:
        """Where a submission is prepared; None: here and now."""
        if message.request.HasField("chat") and self._tokenizer.chat.is_foreign(own):
            return self._foreign
        size = message.ByteSize()
        if size <= INLINE_BYTES and len(message.generated) <= INLINE_GENERATED:
            return None
        return self._long if size >= LONG_BYTES else self._middle

    def close(self) -> None:
        """Begin no more submissions; those that have begun end by themselves."""
        for threads in (self._middle, self._long, self._foreign):
            threads.shutdown(wait=False, cancel_futures=True)
        self._tokenizer.chat.close()
