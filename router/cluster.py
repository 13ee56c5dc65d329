"""ClusterService for operators and RegistryService for runners."""

# ruff: noqa: N802 - methods are named by the service

import re
from typing import Any

import grpc
import structlog

from granatum.adapters_store.base_model import BaseModel
from granatum.adapters_store.model_identity import differences
from granatum.router.registry import Registry
from granatum.v1.cluster_pb2 import (
    DeregisterRequest,
    DeregisterResponse,
    DrainRunnerRequest,
    DrainRunnerResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ListRunnersRequest,
    ListRunnersResponse,
    ResumeRunnerRequest,
    ResumeRunnerResponse,
    Runner,
)
from granatum.v1.cluster_pb2_grpc import ClusterServiceServicer, RegistryServiceServicer
from granatum.v1.errors import InvalidRequest, NotFound, PreconditionFailed

_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_ADDRESS = re.compile(r"\S{1,255}:\d{1,5}")
_POSITIVE = ("max_batch", "total_pages", "page_tokens", "max_context")

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class Cluster(ClusterServiceServicer):
    """Shows the fleet and drains its runners."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListRunners(self, _: ListRunnersRequest, __: Context) -> ListRunnersResponse:
        """The runners that are alive."""
        return ListRunnersResponse(runners=await self._registry.runners())

    async def DrainRunner(self, request: DrainRunnerRequest, _: Context) -> DrainRunnerResponse:
        """Stop placing on a runner; its next heartbeat tells it to let its streams go."""
        _found(await self._registry.drain(request.runner_id), request.runner_id)
        log.info("runner to drain", runner=request.runner_id)
        return DrainRunnerResponse()

    async def ResumeRunner(self, request: ResumeRunnerRequest, _: Context) -> ResumeRunnerResponse:
        """Place on a drained runner again."""
        _found(await self._registry.resume(request.runner_id), request.runner_id)
        log.info("runner in use again", runner=request.runner_id)
        return ResumeRunnerResponse()


class RunnerRegistry(RegistryServiceServicer):
    """Takes the runners' heartbeats."""

    def __init__(self, registry: Registry, base_model: BaseModel, interval_s: float) -> None:
        self._registry = registry
        self._base_model = base_model
        self._interval_s = interval_s

    async def Heartbeat(self, request: HeartbeatRequest, _: Context) -> HeartbeatResponse:
        """Register a runner or renew its lease."""
        self._check(request.runner)
        drain = await self._registry.heartbeat(request.runner)
        return HeartbeatResponse(interval_s=self._interval_s, drain=drain)

    async def Deregister(self, request: DeregisterRequest, _: Context) -> DeregisterResponse:
        """Take a runner out."""
        await self._registry.deregister(request.runner_id)
        log.info("runner gone", runner=request.runner_id)
        return DeregisterResponse()

    def _check(self, runner: Runner) -> None:
        if _ID.fullmatch(runner.id) is None:
            raise InvalidRequest("runner.id: give 1 to 128 of letters, digits and . _ : / -")
        if _ADDRESS.fullmatch(runner.address) is None:
            raise InvalidRequest("runner.address: give host:port as routers reach it")
        for field in _POSITIVE:
            if not getattr(runner, field):
                raise InvalidRequest(f"runner.{field}: give a number above 0")
        if runner.model_fingerprint != self._base_model.fingerprint:
            other = differences(runner.model_fingerprint, self._base_model.fingerprint)
            raise PreconditionFailed(
                f"the runner {runner.id!r} serves {runner.model!r}, "
                f"this router {self._base_model.name!r}, of other {' and '.join(other)}: "
                "give runner and router the same model folder, with all its files",
                reason="MODEL_MISMATCH",
            )


def _found(found: bool, runner_id: str) -> None:
    if not found:
        raise NotFound(f"no runner {runner_id!r} is alive: list the runners to see who is")
