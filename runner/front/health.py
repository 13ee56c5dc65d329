"""grpc.health.v1: a runner serves while its engine's reports prove that the engine computes."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2_grpc

from granatum.service.health import HealthBoard

_CHECK_S = 0.25
SERVICE = "granatum.v1.RunnerService"
SERVICES = ("", SERVICE)


class EngineHealth:
    """Says SERVING while `serving` is true."""

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._board = HealthBoard()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve grpc.health.v1 on `server`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._board, server)

    async def run(self) -> None:
        """Keep the status true until cancelled."""
        while True:
            self._board.set(SERVICES, serving=self._serving())
            await asyncio.sleep(_CHECK_S)

    def stop(self) -> None:
        """Say NOT_SERVING, for good."""
        self._board.close()
