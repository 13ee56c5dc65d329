"""Keeps the runner known to the routers."""

import asyncio
from collections.abc import Callable, Sequence

import grpc
import structlog

from granatum.v1.cluster_pb2 import DeregisterRequest, HeartbeatRequest, HeartbeatResponse, Runner
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.errors import DUPLICATE_RUNNER
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer

_TIMEOUT_S = 3.0
_RETRY_S = 0.5
_SHORTEST_S = 0.05
_LONGEST_S = 60.0
_LOOK_S = 0.25
"""Seconds between checks whether the engine is gone or back."""

log = structlog.get_logger(__name__)


class Heartbeat:
    """Reports to any one of the routers; they share what they know.

    `runner` gives the runner's figures of the moment. It gives None while no engine computes, and
    the runner then goes out of the routers' sight. `set_draining` gets what the operators want.
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
        """The runner as the routers know it; None: perhaps they do not know it."""
        self._is_twin = False
        self._event = ""

    async def run(self) -> None:
        """Report at the routers' interval; while none answers, report again soon."""
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
        """Take the runner out of the fleet; if no router answers, its lease ends by itself."""
        runner, self._registered = self._registered or self._runner(), None
        if runner is None or self._is_twin:  # the other runner of this id is the one that they know
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
        """Go out of the routers' sight, for there is no engine.

        A drained runner lets its lease end instead. No router places on it meanwhile, and to
        deregister it would make the routers forget that it is drained.
        """
        if self._registered is None:
            return
        self._note(log.warning, "not reporting: there is no engine that computes")
        if self._registered.draining:
            self._registered = None
        else:
            await self.deregister()

    async def _rest(self, seconds: float) -> None:
        """Sleep, but wake early if the engine is gone."""
        end = asyncio.get_running_loop().time() + seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left, _LOOK_S))
            if self._runner() is None:
                return

    async def _beat(self, runner: Runner) -> HeartbeatResponse | None:
        """The answer of the first router that gives one; it is asked first from now on."""
        request = HeartbeatRequest(runner=runner)
        failures = []
        for stub in tuple(self._stubs):
            try:
                response: HeartbeatResponse = await stub.Heartbeat(
                    request, metadata=self._metadata, timeout=_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                if from_rpc_error(error).reason == DUPLICATE_RUNNER:
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
            "another live runner has the id",
            runner_id=runner_id,
            todo="give each runner its own --runner-id; this one serves nobody until then",
        )

    def _note(self, write: Callable[..., object], event: str, **details: object) -> None:
        """Log an event, unless the last event was equal."""
        if event != self._event:
            self._event = event
            write(event, **details)
