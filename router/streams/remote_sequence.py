"""A sequence on a runner, as the router's stream sees it."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

from granatum.v1.inference_pb2 import TokenIds
from granatum.v1.runner_pb2 import SequenceOutput

MESSAGE_BYTES = 16 << 10
"""About the size of one message to the client. Between two messages the router sees whether
the client reads."""
UNREAD_BYTES = 256 << 10
UNREAD_TOKENS = 2048
"""The most that may be unread. A client that reads more slowly loses its room on the runner."""


class SessionLost(Exception):
    """The session broke; its sequences must be placed again.

    `alone`: no other sequence of this router was on the lost runner, so this one may be the cause.
    """

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__()
        self.alone = alone


class Unread(Exception):
    """Too much was unread, so the runner forgot the sequence. It must be placed again."""


class RemoteSequence:
    """A sequence's news wait here until they are received, by one receiver.

    `cancel` makes the runner forget the sequence. `release` gives the room on the runner back, and
    may be called twice. It is called as soon as the runner is done with the sequence, before the
    receiver hears of the end: a client that does not read must hold no room.

    Every token passes through here. So a wait costs one future, and one timer watches many waits.
    """

    def __init__(self, cancel: Callable[[], None], release: Callable[[], None]) -> None:
        self._cancel = cancel
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._news: deque[tuple[SequenceOutput, int]] = deque()
        self._bytes = 0
        self._tokens = 0
        self._gone: SessionLost | Unread | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.prompt: TokenIds | None = None
        """The ids that the runner made of the prompt's text, once it has told them."""

    async def receive(self, within_s: float) -> list[SequenceOutput]:
        """The news since the last call: at least one, and about MESSAGE_BYTES at most.

        Raises TimeoutError if nothing comes for `within_s` seconds. Once all news are received,
        raises SessionLost or Unread if the sequence is gone.
        """
        if not self._news and self._gone is None:
            await self._arrival(within_s)
        if not self._news:
            assert self._gone is not None
            raise self._gone
        return self._take()

    def cancel(self) -> None:
        """Make the runner forget the sequence. A second call does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._cancel()
        self._release()

    def deliver(self, output: SequenceOutput, *, over: bool) -> None:
        """Add news. With `over` they are the last."""
        if output.HasField("prompt"):  # not for the client, so nothing that it has not read
            self.prompt = TokenIds(ids=output.prompt.ids)
            output.ClearField("prompt")
        size = output.ByteSize()
        if size <= MESSAGE_BYTES:
            self._pile(output, size)
        else:
            for part in _parts(output):
                self._pile(part, part.ByteSize())
        if over:
            self._release()
        elif self._waiter is None and self._too_much:
            self._gone = Unread()
            self.cancel()
        self._wake()

    def lose(self, lost: SessionLost) -> None:
        """No more news will come."""
        self._gone = lost
        self._release()
        self._wake()

    @property
    def _too_much(self) -> bool:
        return self._bytes > UNREAD_BYTES or self._tokens > UNREAD_TOKENS

    def _pile(self, output: SequenceOutput, size: int) -> None:
        self._news.append((output, size))
        self._bytes += size
        self._tokens += len(output.tokens)

    def _take(self) -> list[SequenceOutput]:
        taken: list[SequenceOutput] = []
        total = 0
        while self._news and (not taken or total + self._news[0][1] <= MESSAGE_BYTES):
            output, size = self._news.popleft()
            taken.append(output)
            total += size
            self._tokens -= len(output.tokens)
        self._bytes -= total
        return taken

    async def _arrival(self, within_s: float) -> None:
        self._waiting_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(within_s, self._look, within_s)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _look(self, within_s: float) -> None:
        """End a wait that took too long, or look again when the wait becomes too long."""
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        end = self._waiting_since + within_s
        if self._loop.time() >= end:
            self._waiter.set_exception(TimeoutError())
        else:
            self._timer = self._loop.call_at(end, self._look, within_s)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _parts(output: SequenceOutput) -> Iterator[SequenceOutput]:
    """News that are too long for one message, as several. The last has all other fields too."""
    part, size = SequenceOutput(sequence_id=output.sequence_id), 0
    for token in output.tokens:
        more = token.ByteSize()
        if part.tokens and size + more > MESSAGE_BYTES:
            yield part
            part, size = SequenceOutput(sequence_id=output.sequence_id), 0
        part.tokens.append(token)
        size += more
    rest = SequenceOutput()
    rest.CopyFrom(output)
    rest.ClearField("tokens")
    part.MergeFrom(rest)
    yield part
