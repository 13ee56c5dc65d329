"""A router's public services without a fleet behind them, on a real loopback port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from granatum.service.health import HealthBoard
from granatum.service.server import build_server, listen
from granatum.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from granatum.v1.errors import NotFound, Overloaded, Unauthenticated
from granatum.v1.transport import bearer_of

KEY = "gk-acme"
Context = grpc.aio.ServicerContext[Any, Any]


class Service(
    inference_pb2_grpc.InferenceServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    cluster_pb2_grpc.ClusterServiceServicer,
):
    """Answers a prompt with its letters; `forever` never ends, `busy` is refused."""

    def __init__(self) -> None:
        self.address = ""
        self.health = HealthBoard()
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.deadlines: list[float | None] = []
        self.ended = asyncio.Event()
        self.uploads: list[tuple[adapters_pb2.UploadHeader, list[bytes]]] = []
        self.adapters = [adapter(f"a{index}") for index in range(3)]
        self.aliases: dict[str, str] = {}
        self.drained: set[str] = set()

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        _authenticate(context)
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        if request.prompt == "busy":
            raise Overloaded("the queue is full: try again", retry_after_s=2)
        start = inference_pb2.GenerationStart(request_id="r1", runner_id="runner-0")
        yield inference_pb2.GenerateResponse(start=start)
        try:
            for letter in request.prompt:
                yield inference_pb2.GenerateResponse(tokens=[token(letter)])
            if request.prompt == "forever":
                await asyncio.Event().wait()
            yield inference_pb2.GenerateResponse(end=end(len(request.prompt)))
        finally:
            self.ended.set()

    async def UploadAdapter(  # noqa: N802
        self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Context
    ) -> adapters_pb2.UploadAdapterResponse:
        _authenticate(context)
        parts = [request async for request in requests]
        self.uploads.append((parts[0].header, [part.chunk for part in parts[1:]]))
        return adapters_pb2.UploadAdapterResponse(
            adapter=adapter(parts[0].header.name), created=True
        )

    async def GetAdapter(  # noqa: N802
        self, request: adapters_pb2.GetAdapterRequest, context: Context
    ) -> adapters_pb2.GetAdapterResponse:
        _authenticate(context)
        for found in self.adapters:
            if found.name == request.adapter:
                return adapters_pb2.GetAdapterResponse(adapter=found)
        raise NotFound(f"no adapter {request.adapter}")

    async def ListAdapters(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        _authenticate(context)
        first = int(request.page_token or 0)
        following = str(first + 1) if first + 1 < len(self.adapters) else ""
        return adapters_pb2.ListAdaptersResponse(
            adapters=self.adapters[first : first + 1], next_page_token=following
        )

    async def ListRunners(  # noqa: N802
        self, request: cluster_pb2.ListRunnersRequest, context: Context
    ) -> cluster_pb2.ListRunnersResponse:
        _authenticate(context)
        runner = cluster_pb2.Runner(
            id="runner-0",
            max_batch=8,
            draining="runner-0" in self.drained,
            trouble="ADAPTER_DISK_FULL: [full]",
        )
        return cluster_pb2.ListRunnersResponse(
            runners=[cluster_pb2.RunnerStatus(runner=runner, reserved=1, heartbeat_age_s=0.5)]
        )

    async def DrainRunner(  # noqa: N802
        self, request: cluster_pb2.DrainRunnerRequest, context: Context
    ) -> cluster_pb2.DrainRunnerResponse:
        _authenticate(context)
        self.drained.add(request.runner_id)
        return cluster_pb2.DrainRunnerResponse()

    async def ResumeRunner(  # noqa: N802
        self, request: cluster_pb2.ResumeRunnerRequest, context: Context
    ) -> cluster_pb2.ResumeRunnerResponse:
        _authenticate(context)
        self.drained.discard(request.runner_id)
        return cluster_pb2.ResumeRunnerResponse()

    async def DeleteAdapter(  # noqa: N802
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        _authenticate(context)
        kept = [adapter for adapter in self.adapters if adapter.name != request.adapter]
        deleted, self.adapters = len(self.adapters) - len(kept), kept
        return adapters_pb2.DeleteAdapterResponse(versions_deleted=deleted)

    async def SetAlias(  # noqa: N802
        self, request: adapters_pb2.SetAliasRequest, context: Context
    ) -> adapters_pb2.SetAliasResponse:
        _authenticate(context)
        self.aliases[request.alias] = request.adapter
        return adapters_pb2.SetAliasResponse(adapter=adapter(request.adapter))

    async def DeleteAlias(  # noqa: N802
        self, request: adapters_pb2.DeleteAliasRequest, context: Context
    ) -> adapters_pb2.DeleteAliasResponse:
        _authenticate(context)
        del self.aliases[request.alias]
        return adapters_pb2.DeleteAliasResponse()

    async def SetVisibility(  # noqa: N802
        self, request: adapters_pb2.SetVisibilityRequest, context: Context
    ) -> adapters_pb2.SetVisibilityResponse:
        _authenticate(context)
        for found in self.adapters:
            if found.name == request.name:
                found.visibility = request.visibility
        return adapters_pb2.SetVisibilityResponse()

    async def VerifyAdapter(  # noqa: N802
        self, request: adapters_pb2.VerifyAdapterRequest, context: Context
    ) -> adapters_pb2.VerifyAdapterResponse:
        _authenticate(context)
        off = request.proof.prompts[0].logprobs[0]
        passed = request.adapter == "right"
        return adapters_pb2.VerifyAdapterResponse(
            result=adapters_pb2.ProofResult(tokens=1, mean=-off, max=-off, bound=0.5),
            passed=passed,
            reason="" if passed else "the adapter is another one",
        )


def token(text: str) -> inference_pb2.Token:
    return inference_pb2.Token(id=ord(text), text=text)


def end(tokens: int) -> inference_pb2.GenerationEnd:
    return inference_pb2.GenerationEnd(
        reason=inference_pb2.FINISH_REASON_STOP,
        usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=tokens),
        timings=inference_pb2.Timings(queue_s=0.1, first_token_s=0.2, total_s=0.3),
        runner_id="runner-1",
    )


def adapter(name: str) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        tenant="acme",
        name=name,
        version=2,
        digest="sha256:" + "ab" * 32,
        size_bytes=2048,
        max_rank=16,
        target_modules=["q_proj"],
        visibility=adapters_pb2.VISIBILITY_PRIVATE,
        aliases=["prod"],
    )


def _authenticate(context: Context) -> None:
    if bearer_of(context.invocation_metadata()) != KEY:
        raise Unauthenticated("no such key: send the key that granatum keys add printed")


@asynccontextmanager
async def serve() -> AsyncIterator[Service]:
    """A running service."""
    service, server = Service(), build_server(())
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(service.health, server)
    service.health.set([""], serving=True)
    service.address = f"127.0.0.1:{listen(server, '127.0.0.1:0')}"
    await server.start()
    try:
        yield service
    finally:
        await server.stop(None)
