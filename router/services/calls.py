"""Clients' open calls: they are counted, cut if nobody reads them, and ended from outside."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import structlog

from granatum.router.services.quotas import Quotas
from granatum.service.error_interceptor import abort
from granatum.v1.errors import RETRY_AFTER_S, GranatumError, Overloaded, Unavailable

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class Call:
    """One client's call. It must be made in the task that runs the call's handler."""

    def __init__(self, context: Context, unread_s: float, done: Callable[[], None]) -> None:
        self._context = context
        self._unread_s = unread_s
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._handler = asyncio.current_task()
        self._ending: asyncio.Task[None] | None = None
        self._writing_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._begun = False

    async def begin(self) -> None:
        """Send the call's headers, before its first message.

        gRPC would send the headers with the first message. While that message is stuck, the call
        could not be ended with an error.
        """
        if not self._begun:
            self._begun = True
            await self._context.send_initial_metadata(())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Watch while gRPC writes a message. gRPC waits until the client has read most others."""
        self._writing_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._unread_s, self._look)
        try:
            yield
        finally:
            self._writing_since = None

    def end(self, error: GranatumError) -> None:
        """End the call with an error, whatever the handler does just now."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(error))

    def close(self) -> None:
        """Note that the handler is over. The call counts until its client has heard of an error."""
        if self._timer is not None:
            self._timer.cancel()
        if self._ending is None:
            self._done()
        else:
            self._ending.add_done_callback(lambda _: self._done())

    async def ended(self) -> None:
        """Wait until the client has heard of the call's error, or is gone."""
        if self._ending is not None:
            await self._ending

    def _look(self) -> None:
        """Cut a client that is stuck, or look again at the time when it would be stuck."""
        self._timer = None
        if self._writing_since is None:
            return
        end = self._writing_since + self._unread_s
        if self._loop.time() < end:
            self._timer = self._loop.call_at(end, self._look)
            return
        log.info("client cut: it does not read", unread_s=self._unread_s)
        self.end(
            Overloaded(
                f"the client read nothing for {self._unread_s:g} s and was cut: read the stream "
                "as it comes, or ask again with fewer tokens",
                reason="SLOW_READER",
                retry_after_s=RETRY_AFTER_S,
            )
        )

    async def _end(self, error: GranatumError) -> None:
        # Do not await before gRPC has the status: meanwhile the cancelled handler could end the
        # call without it.
        if self._handler is None or self._handler.done() or self._context.done():
            return
        self._handler.cancel()
        # gRPC raises AbortError once the client has heard, InternalError if the client is gone.
        with suppress(grpc.aio.BaseError):
            await abort(self._context, error)


class Calls:
    """Opens calls, as far as the quotas allow."""

    def __init__(self, quotas: Quotas, unread_s: float) -> None:
        self._quotas = quotas
        self._unread_s = unread_s
        self._open: set[Call] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def open(self, tenant: str, size: int, context: Context) -> Iterator[Call]:
        """A tenant's call with a request of `size` bytes. Raises Overloaded."""
        self._quotas.acquire(tenant, size)

        def done() -> None:
            self._open.discard(call)
            self._quotas.release(tenant, size)

        call = Call(context, self._unread_s, done)
        self._open.add(call)
        try:
            yield call
        finally:
            call.close()

    def end_all(self) -> None:
        """End every call with an error that sends its client to another router."""
        for call in tuple(self._open):
            call.end(
                Unavailable(
                    "this router stops: try again, at another one if there is one",
                    reason="ROUTER_STOPPING",
                    retry_after_s=RETRY_AFTER_S,
                )
            )

    async def close(self) -> None:
        """After the server has stopped: wait until every ended call's client has heard."""
        await asyncio.gather(*(call.ended() for call in tuple(self._open)), return_exceptions=True)
