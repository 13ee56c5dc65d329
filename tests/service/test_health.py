"""The standard health service, whoever watches it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_http2 import deaf_watcher

from granatum.service.health import HealthBoard
from granatum.service.server import build_server, listen

STATUS = health_pb2.HealthCheckResponse
WATCH = b"/grpc.health.v1.Health/Watch"


@pytest.fixture
async def port_of() -> AsyncIterator[tuple[HealthBoard, int]]:
    board, server = HealthBoard(), build_server(())
    health_pb2_grpc.add_HealthServicer_to_server(board, server)
    board.set(["", "a"], serving=True)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    yield board, port
    await server.stop(None)


async def test_watchers_hear_every_change(port_of: tuple[HealthBoard, int]) -> None:
    board, port = port_of
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(5):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="a")))
        assert (await anext(watch)).status == STATUS.SERVING
        board.set(["a"], serving=False)
        assert (await anext(watch)).status == STATUS.NOT_SERVING
        board.set(["a"], serving=True)
        assert (await anext(watch)).status == STATUS.SERVING
        board.close()
        board.set(["a"], serving=True)
        assert (await anext(watch)).status == STATUS.NOT_SERVING
        other = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="b")))
        assert (await anext(other)).status == STATUS.SERVICE_UNKNOWN
        unknown = stub.Check(health_pb2.HealthCheckRequest(service="b"))
        assert await unknown.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_that_reads_nothing_keeps_nothing(
    port_of: tuple[HealthBoard, int],
) -> None:
    board, port = port_of
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    async with deaf_watcher(port, WATCH), asyncio.timeout(5), channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == STATUS.SERVING
        board.set([""], serving=False)
        assert (await anext(watch)).status == STATUS.NOT_SERVING
