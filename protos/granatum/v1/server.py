"""gRPC's asyncio server, without the one call that ends it.

gRPC decodes the path of every call in its main loop. A path that is no UTF-8, which anybody can
send, raises there, and the whole server stops with all its calls. Calls of known methods take
another way, where the path is not decoded. So all other calls are taken here, and none is asked
for its name: whatever its path says, it is a call of no method.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

_UNKNOWN = "/unknown/unknown"


class _Core(cygrpc.AioServer):  # type: ignore[misc] # untyped
    """Serves known methods as gRPC does, and the others itself."""

    def __init__(self, interceptors: tuple[Any, ...], options: Any) -> None:
        loop = cygrpc.get_working_loop()
        super().__init__(loop, None, (), interceptors, options, None)
        self._interceptors = interceptors
        self._unknown: set[asyncio.Task[None]] = set()

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a known method; where gRPC asks for any other, a task without end."""
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.ensure_future(self._take_unknown())

    async def _take_unknown(self) -> None:
        """Take calls of unknown methods until the server stops, which raises gRPC's own error."""
        resolver = cygrpc._MethodResolver([], {})  # noqa: SLF001
        loop = asyncio.get_running_loop()
        while True:
            state = await self._request_call()
            handling = cygrpc._handle_rpc(  # noqa: SLF001
                _UNKNOWN, resolver, self._interceptors, state, loop, False
            )
            task = loop.create_task(
                cygrpc._schedule_rpc_coro(handling, state, loop, _UNKNOWN)  # noqa: SLF001
            )
            self._unknown.add(task)
            task.add_done_callback(self._unknown.discard)


class _Server(_server.Server):
    def __init__(self, interceptors: tuple[Any, ...], options: Any) -> None:
        # Not the parent's own, which makes a core that cannot be replaced.
        self._server = _Core(interceptors, options)
        self._loop = asyncio.get_event_loop()


def sturdy_server(
    interceptors: Iterable[grpc.aio.ServerInterceptor], options: Iterable[tuple[str, int]]
) -> grpc.aio.Server:
    """A server as `grpc.aio.server` makes it, but no call ends it."""
    return cast(grpc.aio.Server, _Server(tuple(interceptors), tuple(options)))
