"""No call ends a server, whatever stands in its headers."""

import asyncio
import logging
import struct
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from granatum.v1.server import _Server
from granatum.v1.transport import build_server, listen

HEADERS = {
    b":method": b"POST",
    b":scheme": b"http",
    b":path": b"/grpc.health.v1.Health/Check",
    b":authority": b"x",
    b"te": b"trailers",
    b"content-type": b"application/grpc",
}
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


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = struct.pack(">I", len(payload))[1:]
    return size + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def call(headers: dict[bytes, bytes]) -> bytes:
    """A whole connection with one call of an empty message, as HTTP/2."""
    fields = [
        bytes([0, len(name)]) + name + bytes([len(value)]) + value
        for name, value in headers.items()
    ]
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    return preface + frame(1, 4, 1, b"".join(fields)) + frame(0, 1, 1, bytes(5))


async def started() -> tuple[grpc.aio.Server, int]:
    server = build_server(())
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
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
