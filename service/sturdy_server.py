"""gRPC's asyncio server with a way of its own to take calls.

gRPC takes calls in one loop, and two things go wrong there. It decodes the path of every call. A
path that is no UTF-8, which anybody can send, raises, and the whole server stops with all its
calls. And it takes one call of each method per turn of the event loop. In a burst turns are long,
and calls wait so long that gRPC cancels them without a word.

Here calls of known methods are taken many at a turn. All other calls are taken without asking for
their path: whatever it says, it names no method.

This calls private functions of grpcio. Where a version of grpcio has others, gRPC's own server
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
"""The private functions that are called or replaced here, and with how many arguments."""

log = structlog.get_logger(__name__)


class _Core(cygrpc.AioServer):  # type: ignore[misc] # untyped
    """What gRPC asks for as the next call of a method is a task without end, which takes calls."""

    def __init__(self, interceptors: tuple[Any, ...], options: Any) -> None:
        super().__init__(cygrpc.get_working_loop(), None, (), interceptors, options, None)
        self._interceptors = interceptors
        self._handlers: dict[str, Any] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        """Know more methods, by their paths."""
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
                    raise  # as the loop expects it
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
        # Not the parent's own, which makes a core that cannot be replaced.
        self._server = _Core(interceptors, options)
        self._loop = asyncio.get_event_loop()


def sturdy_server(
    interceptors: Iterable[grpc.aio.ServerInterceptor], options: Iterable[tuple[str, int]]
) -> grpc.aio.Server:
    """A server as `grpc.aio.server` makes it, but no call ends it and no burst drowns it."""
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
    """Raise AttributeError or TypeError unless grpcio's private functions are as we know them."""
    for path, arguments in _CALLED.items():
        function: Any = cygrpc
        for name in path.split("."):
            function = getattr(function, name)
        inspect.signature(function).bind(*range(arguments))
    cygrpc._MethodResolver([], {})  # noqa: SLF001
    cygrpc._RequestCallError  # noqa: B018, SLF001
