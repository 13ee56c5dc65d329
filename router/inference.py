"""InferenceService: parse, resolve, relay."""

# ruff: noqa: N802 - methods are named by the service

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from granatum.router.access import current_max_priority, current_tenant
from granatum.router.deadline import Deadline
from granatum.router.request import Request, bounded, seeded
from granatum.router.resolver import Resolver
from granatum.router.stream import Streams
from granatum.v1.inference_pb2 import GenerateRequest, GenerateResponse
from granatum.v1.inference_pb2_grpc import InferenceServiceServicer
from granatum.v1.validation import check


class Inference(InferenceServiceServicer):
    """Streams generated tokens to tenants."""

    def __init__(self, resolver: Resolver, streams: Streams) -> None:
        self._resolver = resolver
        self._streams = streams

    async def Generate(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[GenerateResponse]:
        """Continue a prompt."""
        tenant = current_tenant()
        deadline = Deadline.from_remaining(context.time_remaining())
        check(request)
        request = bounded(request, current_max_priority())
        adapter = await self._resolver.resolve(tenant, request.adapter, deadline)
        request_id = request.request_id or secrets.token_hex(16)
        accepted = Request(
            tenant=tenant,
            request_id=request_id,
            message=seeded(request, tenant, request_id),
            named=bool(request.request_id),
            adapter_digest=adapter.digest,
            adapter=adapter.name,
            rank=adapter.rank,
            elements=adapter.elements,
        )
        stream = self._streams.open(accepted, deadline)
        async with aclosing(stream.responses()) as responses:
            async for response in responses:
                yield response
