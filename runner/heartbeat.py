"""Keeps the runner known to the routers."""

import asyncio
from collections.abc import Callable, Sequence

import grpc
import structlog

from granatum.v1.cluster_pb2 import DeregisterRequest, HeartbeatRequest, HeartbeatResponse, Runner
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.transport import bearer

_TIMEOUT_S = 3.0
_RETRY_S = 0.5
_SHORTEST_S = 0.05
_LONGEST_S = 60.0

log = structlog.get_logger(__name__)


class Heartbeat:
    """Reports to any one of the routers, which share what they know.

    `runner` gives the figures of the moment; `set_draining` is told what the operators want.
    """

    def __init__(
        self,
        channels: Sequence[grpc.aio.Channel],
        cluster_key: str,
        runner: Callable[[], Runner],
        set_draining: Callable[[bool], None],
    ) -> None:
        self._stubs = [RegistryServiceStub(channel) for channel in channels]
        self._metadata = bearer(cluster_key)
        self._runner = runner
        self._set_draining = set_draining
        self._answered: bool | None = None

    async def run(self) -> None:
        """Report at the routers' interval, or soon again while none answers."""
        while True:
            response = await self._beat()
            if response is None:
                await asyncio.sleep(_RETRY_S)
                continue
            self._set_draining(response.drain)
            await asyncio.sleep(min(max(response.interval_s, _SHORTEST_S), _LONGEST_S))

    async def deregister(self) -> None:
        """Take the runner out at once; if no router answers, its lease ends by itself."""
        runner = self._runner()
        request = DeregisterRequest(runner_id=runner.id, instance=runner.instance)
        for stub in tuple(self._stubs):
            try:
                await stub.Deregister(request, metadata=self._metadata, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.warning("router did not deregister us", code=error.code().name)
            else:
                return

    async def _beat(self) -> HeartbeatResponse | None:
        """The answer of the first router that gives one, which is asked first from now on."""
        request = HeartbeatRequest(runner=self._runner())
        failures = []
        for stub in tuple(self._stubs):
            try:
                response: HeartbeatResponse = await stub.Heartbeat(
                    request, metadata=self._metadata, timeout=_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                self._stubs.append(self._stubs.pop(0))
                failures.append(f"{error.code().name}: {error.details()}")
            else:
                self._note(True, "registered")
                return response
        self._note(False, "no router answers", failures=failures)
        return None

    def _note(self, answered: bool, event: str, **details: object) -> None:
        """Log what has changed, once."""
        if answered != self._answered:
            self._answered = answered
            (log.info if answered else log.warning)(event, **details)
