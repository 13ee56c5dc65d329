"""InferenceService: parse, resolve, relay."""

# ruff: noqa: N802 - methods are named by the service

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from granatum.router.services.access import current_max_priority, current_tenant
from granatum.router.services.calls import Calls
from granatum.router.services.resolver import Resolver
from granatum.router.streams.deadline import Deadline
from granatum.router.streams.request import AcceptedRequest, limit_priority, prepare
from granatum.router.streams.stream import Streams
from granatum.v1.inference_pb2 import GenerateRequest, GenerateResponse
from granatum.v1.inference_pb2_grpc import InferenceServiceServicer
from granatum.v1.validation import check


class InferenceServicer(InferenceServiceServicer):
    """Streams generated tokens to tenants."""

    def __init__(self, resolver: Resolver, streams: Streams, calls: Calls) -> None:
        self._resolver = resolver
        self._streams = streams
        self._calls = calls

    async def Generate(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[GenerateResponse]:
        """Continue a prompt."""
        tenant = current_tenant()
        with self._calls.open(tenant, request.ByteSize(), context) as call:
            deadline = Deadline.from_remaining(context.time_remaining())
            accepted = await self._accept(tenant, request, deadline)
            stream = self._streams.open(accepted, deadline)
            async with aclosing(stream.responses()) as responses:
                async for response in responses:
                    await call.begin()
                    with call.writing():
                        yield response

    async def _accept(
        self, tenant: str, message: GenerateRequest, deadline: Deadline
    ) -> AcceptedRequest:
        check(message)
        limit_priority(message, current_max_priority())
        adapter = await self._resolver.resolve(tenant, message.adapter, deadline)
        named = message.request_id
        request_id = named or secrets.token_hex(16)
        prepare(message, tenant, request_id)
        return AcceptedRequest(
            tenant=tenant,
            request_id=request_id,
            message=message,
            named=bool(named),
            adapter_digest=adapter.digest,
            adapter=adapter.name,
            rank=adapter.rank,
            elements=adapter.elements,
            adapter_chat=adapter.chat_sha256,
        )
