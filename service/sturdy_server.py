"""gRPC's asyncio server, which takes calls in a way of its own.

gRPC takes calls in one loop, and the loop has two faults. First, it decodes the path of every call.
Anybody can send a path that is not UTF-8. Decoding then raises, and the server stops with all its
calls. Second, it takes one call of each method per turn of the event loop. In a burst the turns are
long, and calls wait until gRPC cancels them without a word.

This server takes many calls of a known method in one turn. It takes all other calls without asking
for their path, because a path that is not known names no method anyway.

This file calls private functions of grpcio. If a version of grpcio has others, gRPC's own server
serves, with both faults, and the log says so.
"""

import asyncio
import inspect
from collections.abc import Iterable
from typing import Any, cast

import grpc
import structlog
from grpc._cython import cygrpc
from grpc.aio import _server

_AT_A_TURN = 16
_UNKNOWN = "/unknown/unknown"
_CALLED = {
    "AioServer._make_request_call_future": 2,
    "AioServer._request_call": 1,
    "AioServer._request_registered_call": 2,
    "AioServer.add_registered_method_handlers": 2,
    "AioServer.is_running": 1,
    "_handle_rpc": 6,
    "_schedule_rpc_coro": 4,
}
"""The private functions that this file calls or replaces, with their numbers of arguments."""

log = structlog.get_logger(__name__)


class _Core(cygrpc.AioServer):  # type: ignore[misc] # untyped
    """gRPC asks for one call at a time. This class starts tasks that take calls for ever."""

    def __init__(self, interceptors: tuple[Any, ...], options: Any) -> None:
        super().__init__(cygrpc.get_working_loop(), None, (), interceptors, options, None)
        self._interceptors = interceptors
        self._handlers: dict[str, Any] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        """Add methods by their paths."""
        super().add_registered_method_handlers(handlers)
        self._handlers.update(handlers)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        return asyncio.gather(*(self._take_calls(method) for _ in range(_AT_A_TURN)))

    async def _take_calls(self, method: bytes | None) -> None:
        """Take calls of a method, or with None of unknown ones, until the server stops."""
        resolver = cygrpc._MethodResolver([], self._handlers)  # noqa: SLF001
        path = _UNKNOWN if method is None else method.decode()
        while True:
            try:
                call = await self._next_call(method)
            except cygrpc._RequestCallError:  # noqa: SLF001
                if not self.is_running():
                    raise  # gRPC's loop ends by this error
            else:
                self._handle(path, resolver, call)

    async def _next_call(self, method: bytes | None) -> Any:
        if method is None:
            return await self._request_call()
        return await self._request_registered_call(method)

    def _handle(self, path: str, resolver: Any, call: Any) -> None:
        loop = asyncio.get_running_loop()
        handling = cygrpc._handle_rpc(  # noqa: SLF001
            path, resolver, self._interceptors, call, loop, False
        )
        task = loop.create_task(
            cygrpc._schedule_rpc_coro(handling, call, loop, path)  # noqa: SLF001
        )
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)


class _Server(_server.Server):
    def __init__(self, interceptors: tuple[Any, ...], options: Any) -> None:
        # The parent's own would make a core that cannot be replaced.
        self._server = _Core(interceptors, options)
        self._loop = asyncio.get_event_loop()


def sturdy_server(
    interceptors: Iterable[grpc.aio.ServerInterceptor], options: Iterable[tuple[str, int]]
) -> grpc.aio.Server:
    """A server as `grpc.aio.server` makes it. No call ends the server, and no burst drowns it."""
    checks, given = tuple(interceptors), tuple(options)
    try:
        _check_grpc()
        return cast(grpc.aio.Server, _Server(checks, given))
    except (AttributeError, TypeError) as error:
        log.warning(
            "this grpcio is not the one that was tested: a hostile call may end the server",
            version=grpc.__version__,
            error=str(error),
        )
        return grpc.aio.server(interceptors=checks, options=given)


def _check_grpc() -> None:
    """Raise AttributeError or TypeError unless grpcio has the private functions that we know."""
    for path, arguments in _CALLED.items():
        function: Any = cygrpc
        for name in path.split("."):
            function = getattr(function, name)
        inspect.signature(function).bind(*range(arguments))
    cygrpc._MethodResolver([], {})  # noqa: SLF001
    cygrpc._RequestCallError  # noqa: B018, SLF001
