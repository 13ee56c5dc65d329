"""grpc.health.v1: whether the engine computes, as its reports prove."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2_grpc

from granatum.service.health import HealthBoard

_CHECK_S = 0.25
SERVICES = ("", "granatum.v1.RunnerService")


class Health:
    """Says SERVING while `serving` says so."""

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._board = HealthBoard()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it."""
        health_pb2_grpc.add_HealthServicer_to_server(self._board, server)

    async def run(self) -> None:
        """Keep the answer true."""
        while True:
            self._board.set(SERVICES, serving=self._serving())
            await asyncio.sleep(_CHECK_S)

    def stop(self) -> None:
        """Say NOT_SERVING, for good."""
        self._board.close()
