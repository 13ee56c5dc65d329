"""How many calls of one caller are taken in at a time.

A message takes memory while it arrives, before any quota can count it. A short call takes processor
time. So every call waits for a turn before its message is read. Meanwhile gRPC holds the client's
message back.
"""

from __future__ import annotations  # grpc.RpcMethodHandler takes parameters in its stub alone

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from granatum.v1.errors import RETRY_AFTER_S, DeadlineExceeded, InvalidRequest, Overloaded

_AT_A_TIME = 8
_MOST_WAITING = 4096
_WITHIN_S = 60.0

Context = grpc.aio.ServicerContext[Any, Any]
Lane = tuple[str, str]

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


@dataclass(slots=True)
class _Turns:
    """The calls of one lane."""

    calls: int = 0
    seats: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_A_TIME))


class Turns:
    """One lane for each caller and method.

    So no caller waits for another caller, and no short call for a long one.
    """

    def __init__(self, within_s: float = _WITHIN_S) -> None:
        self._within_s = within_s
        self._lanes: dict[Lane, _Turns] = {}

    def __len__(self) -> int:
        return len(self._lanes)

    def wrap(self, handler: Handler, method: str, caller: str | None) -> Handler:
        """The same handler, which waits for turns. A caller without a name counts by its host.

        A call with one request and one response keeps its turn to the end. One with a stream of
        responses keeps its turn until its message is read. Streams in both directions keep it to
        the end. Uploads are not wrapped: they have seats of their own.
        """
        codec = (handler.request_deserializer, handler.response_serializer)

        def lane(context: Context) -> Lane:
            return caller or _host(context.peer()), method

        if handler.unary_unary:
            behavior = self._unary(handler.unary_unary, lane)
            return grpc.stream_unary_rpc_method_handler(behavior, *codec)
        if handler.unary_stream:
            behavior = self._stream(handler.unary_stream, lane)
            return grpc.stream_stream_rpc_method_handler(behavior, *codec)
        if handler.stream_stream:
            behavior = self._dialogue(handler.stream_stream, lane)
            return grpc.stream_stream_rpc_method_handler(behavior, *codec)
        return handler

    def _unary(self, behavior: Callable[..., Any], lane: Callable[[Context], Lane]) -> Any:
        async def call(requests: AsyncIterator[Any], context: Context) -> Any:
            with self._counted(lane(context)) as seats:
                async with seats:
                    return await behavior(await self._only(requests), context)

        return call

    def _stream(self, behavior: Callable[..., Any], lane: Callable[[Context], Lane]) -> Any:
        async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            with self._counted(lane(context)) as seats:
                async with seats:
                    request = await self._only(requests)
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    yield response

        return stream

    def _dialogue(self, behavior: Callable[..., Any], lane: Callable[[Context], Lane]) -> Any:
        async def paced(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            while (request := await self._next(requests)) is not None:
                yield request

        async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            with self._counted(lane(context)) as seats:
                async with seats, aclosing(behavior(paced(requests), context)) as responses:
                    async for response in responses:
                        yield response

        return stream

    @contextmanager
    def _counted(self, lane: Lane) -> Iterator[asyncio.Semaphore]:
        turns = self._lanes.setdefault(lane, _Turns())
        if turns.calls >= _MOST_WAITING:
            raise Overloaded(
                f"{_MOST_WAITING:,} calls of yours are waiting here: try again when some are over",
                reason="CALLER_CALLS",
                retry_after_s=RETRY_AFTER_S,
            )
        turns.calls += 1
        try:
            yield turns.seats
        finally:
            turns.calls -= 1
            if not turns.calls:
                del self._lanes[lane]

    async def _next(self, requests: AsyncIterator[Any]) -> Any:
        """The next message, or None after the last."""
        try:
            async with asyncio.timeout(self._within_s):
                return await anext(aiter(requests), None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the message did not arrive within {self._within_s:g} s: send it over a faster "
                "link, or a shorter one",
                reason="MESSAGE_SLOW",
            ) from None

    async def _only(self, requests: AsyncIterator[Any]) -> Any:
        request = await self._next(requests)
        if request is None:
            raise InvalidRequest("the call has no message: send one")
        return request


def _host(peer: str) -> str:
    """The part of gRPC's `ipv4:127.0.0.1:1234` that all connections of a machine share."""
    return peer.rpartition(":")[0]
