"""The standard health service, grpc.health.v1. Strangers may ask it.

gRPC's own servicer holds a service's lock while it writes to a watcher. One watcher that reads
nothing then blocks every later change of the status, and the stop of the server.
"""

# ruff: noqa: N802 - methods are named by the service

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from granatum.v1.errors import NotFound

Context = grpc.aio.ServicerContext[Any, Any]


class HealthBoard(HealthServicer):  # type: ignore[misc] # untyped
    """The statuses of services. To set one never waits, and no watcher is remembered."""

    def __init__(self) -> None:
        self._statuses: dict[str, HealthCheckResponse.ServingStatus.ValueType] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, services: Iterable[str], *, serving: bool) -> None:
        """Say whether these services serve. After `close` this does nothing."""
        if not self._closed:
            self._post(services, serving=serving)

    def close(self) -> None:
        """Say for good that nothing is served any more."""
        self._closed = True
        self._post(self._statuses, serving=False)

    async def Check(self, request: HealthCheckRequest, _: Context) -> HealthCheckResponse:
        """The status of one service."""
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFound("there is no such service here", field="service")
        return HealthCheckResponse(status=status)

    async def Watch(
        self, request: HealthCheckRequest, _: Context
    ) -> AsyncIterator[HealthCheckResponse]:
        """The status now, and again whenever it changes."""
        told: HealthCheckResponse.ServingStatus.ValueType | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != told:
                told = status
                yield HealthCheckResponse(status=status)
            await changed.wait()

    def _post(self, services: Iterable[str], *, serving: bool) -> None:
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        self._statuses |= dict.fromkeys(services, status)
        self._changed.set()
        self._changed = asyncio.Event()
