"""The standard gRPC health check, asked from outside."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import Tls, open_channel

_POLL_S = 0.1


async def is_serving(
    address: str, tls: Tls | None = None, *, insecure: bool = False, timeout_s: float = 5.0
) -> bool:
    """Whether the service at `host:port` says that it serves; raises if it says nothing."""
    async with open_channel(address, tls, insecure=insecure) as channel:
        request = health_pb2.HealthCheckRequest()
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def until_serving(address: str, service: str = "") -> None:
    """Return as soon as the process on this machine serves that service; wait without end.

    `service` is a full name; empty: the process as a whole.
    """
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            if await _serves(stub, service):
                return
            await asyncio.sleep(_POLL_S)


async def _serves(stub: health_pb2_grpc.HealthStub, service: str) -> bool:
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        answer = await stub.Check(request, wait_for_ready=True)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
