"""What a stranger may send to any method, and what it learns of our bugs."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from granatum.service.server import build_server, listen
from granatum.v1.adapters_pb2 import UploadAdapterRequest, UploadAdapterResponse
from granatum.v1.adapters_pb2_grpc import (
    AdapterServiceServicer,
    add_AdapterServiceServicer_to_server,
)
from granatum.v1.errors import GranatumError, Internal, InvalidRequest
from granatum.v1.inference_pb2 import GenerateRequest, GenerateResponse
from granatum.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from granatum.v1.rich_status import from_rpc_error

GENERATE = ("unary_stream", "/granatum.v1.InferenceService/Generate")
GET = ("unary_unary", "/granatum.v1.AdapterService/GetAdapter")
UPLOAD = ("stream_unary", "/granatum.v1.AdapterService/UploadAdapter")
MALFORMED = {
    "no protobuf": b"\xff\xff\xff",
    "cut short": b"\x0a\x10abc",
    "no UTF-8": b"\x0a\x02\xff\xfe",
    "a lone surrogate": b"\x0a\x03\xed\xa0\x80",
}


class Service(InferenceServiceServicer, AdapterServiceServicer):
    """Takes anything."""

    async def Generate(  # noqa: N802
        self, request: GenerateRequest, context: Any
    ) -> AsyncIterator[GenerateResponse]:
        yield GenerateResponse()

    async def UploadAdapter(  # noqa: N802
        self, requests: AsyncIterator[UploadAdapterRequest], context: Any
    ) -> UploadAdapterResponse:
        async for _ in requests:
            pass
        return UploadAdapterResponse()


class Faulty(grpc.aio.ServerInterceptor):
    """Has a bug."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        raise RuntimeError("secret")


@asynccontextmanager
async def serving(*interceptors: grpc.aio.ServerInterceptor) -> AsyncIterator[grpc.aio.Channel]:
    server = build_server((), interceptors)
    service: Any = Service()  # type: ignore[abstract] # it has what is called here
    add_InferenceServiceServicer_to_server(service, server)
    add_AdapterServiceServicer_to_server(service, server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def error_of(channel: grpc.aio.Channel, kind: str, path: str, data: bytes) -> GranatumError:
    method = getattr(channel, kind)(path)
    call = method(iter([data]) if kind.startswith("stream") else data, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if kind.endswith("unary") else call.read())
    return from_rpc_error(caught.value)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.ERROR):
        yield caplog


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("method", [GENERATE, GET, UPLOAD], ids=["stream", "unary", "upload"])
async def test_a_malformed_message_is_the_callers_error(
    method: tuple[str, str], data: bytes, log: pytest.LogCaptureFixture
) -> None:
    async with serving() as channel:
        error = await error_of(channel, *method, data)
    assert isinstance(error, InvalidRequest)
    assert error.reason == "MALFORMED_MESSAGE"
    assert "granatum.v1." in error.message
    assert "Error" not in error.message
    assert not log.records


async def test_a_bug_before_the_handler_says_nothing_of_itself() -> None:
    async with serving(Faulty()) as channel:
        error = await error_of(channel, *GENERATE, b"")
    assert isinstance(error, Internal)
    assert "secret" not in error.message
