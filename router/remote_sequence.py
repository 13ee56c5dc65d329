"""A sequence on a runner, as the router's stream sees it."""

import asyncio
from collections.abc import Callable

from granatum.v1.runner_pb2 import SequenceOutput


class SessionLost(Exception):
    """The session broke; its sequences are to be placed again.

    `reached`: the runner was connected, so that it may be the sequence that brought it down.
    """

    def __init__(self, *, reached: bool) -> None:
        super().__init__()
        self.reached = reached


class RemoteSequence:
    """A sequence's news pile up here until they are received, by one receiver.

    Every token passes here, so waiting takes one future, and its limit one timer every so often.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._news: list[SequenceOutput] = []
        self._lost: SessionLost | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def receive(self, within_s: float) -> list[SequenceOutput]:
        """Everything new since the last call, at least one.

        Raises SessionLost, and TimeoutError if nothing comes for `within_s` seconds.
        """
        if not self._news and self._lost is None:
            await self._arrival(within_s)
        if not self._news:
            assert self._lost is not None
            raise self._lost
        news, self._news = self._news, []
        return news

    def cancel(self) -> None:
        """Have the runner forget it; again, or after its end, is no harm."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._cancel()

    def deliver(self, output: SequenceOutput) -> None:
        """Add news."""
        self._news.append(output)
        self._wake()

    def lose(self, lost: SessionLost) -> None:
        """No more news will come."""
        self._lost = lost
        self._wake()

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
        """End a wait that took too long, or look again when it would have."""
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
