"""grpc.health.v1: whether the engine computes, as its reports prove."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

_CHECK_S = 0.25
SERVICES = ("", "granatum.v1.RunnerService")


class Health:
    """Says SERVING while `serving` says so."""

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._servicer = health.aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def run(self) -> None:
        """Keep the answer true."""
        while True:
            await self._set(self._serving())
            await asyncio.sleep(_CHECK_S)

    async def stop(self) -> None:
        """Say NOT_SERVING, for good."""
        await self._servicer.enter_graceful_shutdown()

    async def _set(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in SERVICES:
            await self._servicer.set(service, status.SERVING if serving else status.NOT_SERVING)
