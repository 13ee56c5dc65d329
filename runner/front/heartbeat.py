"""Keeps the runner known to the routers."""

import asyncio
from collections.abc import Callable, Sequence

import grpc
import structlog

from granatum.v1.cluster_pb2 import DeregisterRequest, HeartbeatRequest, HeartbeatResponse, Runner
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer

_TIMEOUT_S = 3.0
_RETRY_S = 0.5
_SHORTEST_S = 0.05
_LONGEST_S = 60.0
_LOOK_S = 0.25
"""Between looks whether the engine is gone, or back."""
DUPLICATE = "DUPLICATE_RUNNER"
"""A router's reason: a live runner of another process has our id."""

log = structlog.get_logger(__name__)


class Heartbeat:
    """Reports to any one of the routers, which share what they know.

    `runner` gives the figures of the moment, None while there is no engine that computes: the
    runner is then taken out of the routers' sight. `set_draining` is told what the operators want.
    """

    def __init__(
        self,
        channels: Sequence[grpc.aio.Channel],
        cluster_key: str,
        runner: Callable[[], Runner | None],
        set_draining: Callable[[bool], None],
    ) -> None:
        self._stubs = [RegistryServiceStub(channel) for channel in channels]
        self._metadata = bearer(cluster_key)
        self._runner = runner
        self._set_draining = set_draining
        self._registered: Runner | None = None
        """As the routers know us; None: perhaps they do not."""
        self._is_twin = False
        self._event = ""

    async def run(self) -> None:
        """Report at the routers' interval, or soon again while none answers."""
        while True:
            runner = self._runner()
            if runner is None:
                await self._vanish()
                await asyncio.sleep(_LOOK_S)
                continue
            response = await self._beat(runner)
            if response is None:
                await asyncio.sleep(_RETRY_S)
                continue
            self._set_draining(response.drain)
            await self._rest(min(max(response.interval_s, _SHORTEST_S), _LONGEST_S))

    async def deregister(self) -> None:
        """Take the runner out at once; if no router answers, its lease ends by itself."""
        runner, self._registered = self._registered or self._runner(), None
        if runner is None or self._is_twin:  # a twin would take the other one out
            return
        request = DeregisterRequest(runner_id=runner.id, instance=runner.instance)
        for stub in tuple(self._stubs):
            try:
                await stub.Deregister(request, metadata=self._metadata, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.warning("router did not deregister us", code=error.code().name)
            else:
                return

    async def _vanish(self) -> None:
        """Go out of sight; if operators drain us, by the end of the lease alone.

        No router places on a drained runner, and to deregister would forget that it is one.
        """
        if self._registered is None:
            return
        self._note(log.warning, "not reporting: there is no engine that computes")
        if self._registered.draining:
            self._registered = None
        else:
            await self.deregister()

    async def _rest(self, seconds: float) -> None:
        """Sleep, but not on after the engine is gone."""
        end = asyncio.get_running_loop().time() + seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left, _LOOK_S))
            if self._runner() is None:
                return

    async def _beat(self, runner: Runner) -> HeartbeatResponse | None:
        """The answer of the first router that gives one, which is asked first from now on."""
        request = HeartbeatRequest(runner=runner)
        failures = []
        for stub in tuple(self._stubs):
            try:
                response: HeartbeatResponse = await stub.Heartbeat(
                    request, metadata=self._metadata, timeout=_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                if from_rpc_error(error).reason == DUPLICATE:
                    self._note_twin(runner.id)
                    return None
                self._stubs.append(self._stubs.pop(0))
                failures.append(f"{error.code().name}: {error.details()}")
            else:
                self._registered, self._is_twin = runner, False
                self._note(log.info, "registered")
                return response
        self._note(log.warning, "no router answers", failures=failures)
        return None

    def _note_twin(self, runner_id: str) -> None:
        self._registered, self._is_twin = None, True
        self._note(
            log.error,
            f"another live runner has the id {runner_id}: give each runner its own --runner-id; "
            "this one serves nobody until the other one is gone",
        )

    def _note(self, write: Callable[..., object], event: str, **details: object) -> None:
        """Log what has changed, once."""
        if event != self._event:
            self._event = event
            write(event, **details)
