"""grpc.health.v1: whether the engine computes, as its reports prove."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

STALE_S = 5.0
"""An idle engine reports twice a second; the longest step is well below this."""
_CHECK_S = 0.25
SERVICES = ("", "granatum.v1.RunnerService")


class Health:
    """Says SERVING while `age_s` (seconds since the engine's last report, None: never) is small."""

    def __init__(self, age_s: Callable[[], float | None]) -> None:
        self._age_s = age_s
        self._servicer = health.aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def run(self) -> None:
        """Keep the answer true."""
        while True:
            await self._set(self._is_serving())
            await asyncio.sleep(_CHECK_S)

    async def stop(self) -> None:
        """Say NOT_SERVING, for good."""
        await self._servicer.enter_graceful_shutdown()

    def _is_serving(self) -> bool:
        age = self._age_s()
        return age is not None and age < STALE_S

    async def _set(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in SERVICES:
            await self._servicer.set(service, status.SERVING if serving else status.NOT_SERVING)
