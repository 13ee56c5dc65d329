"""No call ends a server, whatever stands in its headers."""

import asyncio
import logging
from typing import Any

import grpc
import pytest
import raw_http2 as http2
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_http2 import frame, grpc_headers

from granatum.service.health import HealthBoard
from granatum.service.server import build_server, listen
from granatum.service.sturdy_server import _Server

HEADERS = grpc_headers(b"/grpc.health.v1.Health/Check")
HOSTILE = {
    "no UTF-8": {b":path": b"/\xff\xfe"},
    "half a character": {b":path": b"/a\xc3(/x"},
    "no service": {b":path": b"/"},
    "no slash": {b":path": b"x"},
    "zeros": {b":path": b"/\x00\x00"},
    "a key that is no text": {b"authorization": b"Bearer \xff\xfe"},
    "a timeout that is no number": {b"grpc-timeout": b"\xffS"},
    "a timeout without end": {b"grpc-timeout": b"99999999H"},
    "an encoding that is none": {b"grpc-encoding": b"\xff"},
    "a binary header that is none": {b"x-bin": b"\xff!"},
}


def call(headers: dict[bytes, bytes]) -> bytes:
    """A whole connection with one call of an empty message, as HTTP/2."""
    begun = http2.PREFACE + frame(http2.SETTINGS, 0, 0, b"")
    begun += frame(http2.HEADERS, http2.END_HEADERS, 1, http2.block(headers))
    return begun + frame(http2.DATA, http2.END_STREAM, 1, http2.message(b""))


async def started() -> tuple[grpc.aio.Server, int]:
    server = build_server(())
    servicer = HealthBoard()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set([""], serving=True)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    return server, port


async def assert_serves(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_headers_end_no_server(
    change: dict[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    server, port = await started()
    for _ in range(2):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(call(HEADERS | change))
        async with asyncio.timeout(5):
            assert await reader.read(1)
        writer.close()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await assert_serves(channel)
        method: Any = channel.unary_unary("/granatum.v1.NoService/Do")
        assert await method(b"", timeout=5).code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(None)
    assert not [r for r in caplog.records if r.levelno >= logging.CRITICAL]


async def test_the_grpc_that_is_tested_takes_our_server() -> None:
    assert isinstance(build_server(()), _Server)


@pytest.mark.parametrize("name", ["_handle_rpc", "_schedule_rpc_coro", "_MethodResolver"])
@pytest.mark.parametrize("changed", [True, False], ids=["other arguments", "gone"])
async def test_another_grpc_serves_with_its_own_server(
    monkeypatch: pytest.MonkeyPatch, name: str, changed: bool
) -> None:
    if changed:
        monkeypatch.setattr(cygrpc, name, lambda: None)
    else:
        monkeypatch.delattr(cygrpc, name)
    server, port = await started()
    assert not isinstance(server, _Server)
    monkeypatch.undo()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await assert_serves(channel)
    await server.stop(None)
