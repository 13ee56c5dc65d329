"""Every RPC of every service against every kind of key, taken from the descriptors."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from raw_http2 import deaf_watcher
from router_box import CLUSTER_KEY, Box

from granatum.router.app import RouterApp
from granatum.router.services.access import ADAPTERS, CLUSTER, INFERENCE, REGISTRY, SERVICES
from granatum.v1 import adapters_pb2, cluster_pb2, inference_pb2
from granatum.v1.transport import bearer

METHODS = [
    method
    for file in (inference_pb2, adapters_pb2, cluster_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
OPENS = {INFERENCE: "tenant", ADAPTERS: "tenant", CLUSTER: "admin", REGISTRY: "cluster"}
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


async def code_of(channel: grpc.aio.Channel, method: Any, metadata: Any) -> grpc.StatusCode:
    """The status of a call with an empty request."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_" + (
        "stream" if method.server_streaming else "unary"
    )
    path = f"/{method.containing_service.full_name}/{method.name}"
    call = getattr(channel, kind)(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    empty = GetMessageClass(method.input_type)()

    async def requests() -> AsyncIterator[Any]:
        yield empty

    begun = call(requests() if method.client_streaming else empty, metadata=metadata, timeout=5)
    code: grpc.StatusCode = await begun.code()
    return code


def test_every_service_has_its_key() -> None:
    assert set(OPENS) == set(SERVICES) == {m.containing_service.full_name for m in METHODS}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_only_the_right_key_opens_a_method(box: Box, method: Any) -> None:
    await box.router()
    channel = box.channel()
    keys = {"tenant": box.acme, "admin": box.admin, "cluster": CLUSTER_KEY}
    right = keys.pop(OPENS[method.containing_service.full_name])
    wrong: list[Any] = [bearer(key) for key in keys.values()]
    wrong += [None, bearer(secrets.token_hex()), (("authorization", f"Basic {right}"),)]
    wrong += [bearer(right[:-1]), (("x-authorization", f"Bearer {right}"),)]
    for metadata in wrong:
        assert await code_of(channel, method, metadata) in REFUSALS
    assert await code_of(channel, method, bearer(right)) not in REFUSALS


async def test_an_unknown_method_is_not_told_from_a_forbidden_one(box: Box) -> None:
    await box.router()
    call: Any = box.channel().unary_unary("/granatum.v1.SecretService/Do")
    assert await call(b"", timeout=5).code() is grpc.StatusCode.UNAUTHENTICATED
    call = box.channel().unary_unary("/granatum.v1.SecretService/Do")
    metadata = bearer(box.admin)
    assert await call(b"", metadata=metadata, timeout=5).code() is grpc.StatusCode.PERMISSION_DENIED


async def test_health_and_reflection_are_open(box: Box) -> None:
    await box.router()
    channel = box.channel()
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflected: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = await reflected.ServerReflectionInfo(iter([request]), timeout=5).read()
    assert {s.name for s in answer.list_services_response.service} >= set(SERVICES)


async def test_a_stranger_that_watches_and_reads_nothing_does_not_keep_a_router(box: Box) -> None:
    async with (
        AsyncExitStack() as strangers,
        asyncio.timeout(3),
        RouterApp(box.settings()) as router,
    ):
        watcher = deaf_watcher(router.port, b"/grpc.health.v1.Health/Watch")
        await strangers.enter_async_context(watcher)
        await asyncio.sleep(0.2)  # until gRPC has taken the call
