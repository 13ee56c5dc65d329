"""ClusterService for operators and RegistryService for runners."""

# ruff: noqa: N802 - methods are named by the service

import re
from typing import Any

import grpc
import structlog

from granatum.models.base_model import BaseModel
from granatum.models.identity import differences
from granatum.router.placement.registry import Registry
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
_ADDRESS = re.compile(r"[!-~]{1,255}:([0-9]{1,5})")
_POSITIVE = ("max_batch", "total_pages", "page_tokens", "max_context")
_MOST = {
    "max_batch": 1 << 16,
    "total_pages": (1 << 31) - 1,
    "page_tokens": 1 << 20,
    "max_context": (1 << 31) - 1,
    "max_rank": 1 << 16,
    "max_adapter_elements": 1 << 53,
    "sequences": 1 << 20,
}
"""Bounds that no runner reaches. Lua and JSON hold numbers up to these exactly."""
_LONGEST = {"model": 1024, "model_fingerprint": 128, "instance": 128, "trouble": 4096}
_MOST_ADAPTERS = 1 << 16
_LONGEST_DIGEST = 128

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger(__name__)


class ClusterServicer(ClusterServiceServicer):
    """Shows the fleet and drains its runners."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListRunners(self, _: ListRunnersRequest, __: Context) -> ListRunnersResponse:
        """The runners that are alive."""
        return ListRunnersResponse(runners=await self._registry.runners())

    async def DrainRunner(self, request: DrainRunnerRequest, _: Context) -> DrainRunnerResponse:
        """Stop placing on a runner; its next heartbeat tells it to let its streams go."""
        _check_id(request.runner_id)
        _found(await self._registry.drain(request.runner_id), request.runner_id)
        log.info("runner to drain", runner=request.runner_id)
        return DrainRunnerResponse()

    async def ResumeRunner(self, request: ResumeRunnerRequest, _: Context) -> ResumeRunnerResponse:
        """Place on a drained runner again."""
        _check_id(request.runner_id)
        _found(await self._registry.resume(request.runner_id), request.runner_id)
        log.info("runner in use again", runner=request.runner_id)
        return ResumeRunnerResponse()


class RegistryServicer(RegistryServiceServicer):
    """Takes the runners' heartbeats."""

    def __init__(self, registry: Registry, base_model: BaseModel, interval_s: float) -> None:
        self._registry = registry
        self._base_model = base_model
        self._interval_s = interval_s
        self._refused: dict[str, str] = {}

    async def Heartbeat(self, request: HeartbeatRequest, _: Context) -> HeartbeatResponse:
        """Register a runner or renew its lease."""
        runner = request.runner
        _check(runner)
        self._check_model(runner)
        try:
            drain = await self._registry.heartbeat(runner)
        except PreconditionFailed as error:
            self._note_refusal(runner, error)
            raise
        return HeartbeatResponse(interval_s=self._interval_s, drain=drain)

    async def Deregister(self, request: DeregisterRequest, _: Context) -> DeregisterResponse:
        """Take a runner out."""
        _check_id(request.runner_id)
        _check_length("instance", request.instance, _LONGEST["instance"])
        if await self._registry.deregister(request.runner_id, request.instance):
            log.info("runner gone", runner=request.runner_id)
        return DeregisterResponse()

    def _check_model(self, runner: Runner) -> None:
        if runner.model_fingerprint != self._base_model.fingerprint:
            other = differences(runner.model_fingerprint, self._base_model.fingerprint)
            raise PreconditionFailed(
                f"the runner {runner.id!r} serves {runner.model!r}, "
                f"this router {self._base_model.name!r}, of other {' and '.join(other)}: "
                "give runner and router the same model folder, with all its files",
                reason="MODEL_MISMATCH",
            )

    def _note_refusal(self, runner: Runner, error: PreconditionFailed) -> None:
        """Log a refused process once, not at each of its heartbeats."""
        if self._refused.get(runner.id) != runner.instance:
            self._refused[runner.id] = runner.instance
            log.error("runner refused", runner=runner.id, error=error.message)


def _check(runner: Runner) -> None:
    """Raise InvalidRequest for the first field of a heartbeat that no real runner would send."""
    _check_id(runner.id, "runner.id")
    address = _ADDRESS.fullmatch(runner.address)
    if address is None or int(address[1]) >= 1 << 16:
        raise _wrong("runner.address", "give host:port as routers reach it")
    _check_numbers(runner)
    for field, longest in _LONGEST.items():
        _check_length(f"runner.{field}", getattr(runner, field), longest)
    if len(runner.resident_adapters) > _MOST_ADAPTERS:
        raise _wrong("runner.resident_adapters", f"give at most {_MOST_ADAPTERS:,} digests")
    for digest in runner.resident_adapters:
        _check_length("runner.resident_adapters", digest, _LONGEST_DIGEST)


def _check_numbers(runner: Runner) -> None:
    for field in _POSITIVE:
        if not getattr(runner, field):
            raise _wrong(f"runner.{field}", "give a number above 0")
    for field, most in _MOST.items():
        if getattr(runner, field) > most:
            raise _wrong(f"runner.{field}", f"give at most {most:,}")
    for field in ("free_pages", "reclaimable_pages"):
        if getattr(runner, field) > runner.total_pages:
            raise _wrong(f"runner.{field}", "give no more than runner.total_pages")


def _check_id(runner_id: str, field: str = "runner_id") -> None:
    if _ID.fullmatch(runner_id) is None:
        raise _wrong(field, "give 1 to 128 of letters, digits and . _ : / -")


def _check_length(field: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise _wrong(field, f"give at most {longest:,} characters")


def _wrong(field: str, what_to_give: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {what_to_give}", field=field)


def _found(found: bool, runner_id: str) -> None:
    if not found:
        raise NotFound(f"no runner {runner_id!r} is alive: list the runners to see who is")
