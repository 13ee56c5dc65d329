"""Turns what handlers raise, and messages that cannot be parsed, into rich statuses."""

from __future__ import annotations  # grpc.RpcMethodHandler takes parameters in its stub alone

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_status import rpc_status

from granatum.v1.errors import GranatumError, Internal, InvalidRequest
from granatum.v1.rich_status import to_status

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[..., Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps what a handler raises to a rich status. An unknown exception is logged as our bug.

    A message that cannot be parsed is the caller's error, alone or in a stream.
    """

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one call."""
        try:
            handler = await continuation(handler_call_details)
        except Exception as error:
            return _refusal(error)
        return _wrap(handler) if handler is not None else handler


async def abort(context: Context, error: Exception) -> None:
    """End a call with an error's rich status. Raises AbortError, as gRPC requires."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, GranatumError):
        log.error("unexpected error", exc_info=error)
        error = Internal("internal error: the server's log has the details")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _refusal(error: Exception) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends any call with `error`. A stream handler can serve unary calls too."""

    async def refuse(_: Any, context: Context) -> AsyncIterator[Any]:
        await abort(context, error)
        yield  # pragma: no cover - abort raises

    return grpc.stream_stream_rpc_method_handler(refuse)


def _wrap(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    codec = (_parse(handler.request_deserializer), handler.response_serializer)
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(_call(handler.unary_unary), *codec)
    if handler.stream_unary:
        behavior = _call(_of_stream(handler.stream_unary))
        return grpc.stream_unary_rpc_method_handler(behavior, *codec)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream), *codec)
    assert handler.stream_stream is not None
    behavior = _stream(_of_stream(handler.stream_stream))
    return grpc.stream_stream_rpc_method_handler(behavior, *codec)


@dataclass(frozen=True, slots=True)
class _Malformed:
    """A message that could not be parsed.

    gRPC shows the caller whatever a parser raises. So the parser returns this record, and the
    wrapped handler raises its error.
    """

    error: InvalidRequest


def _parse(parser: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if parser is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return parser(data)
        except Exception:
            return _Malformed(_malformed(parser))

    return parse


def _malformed(parser: Callable[[bytes], Any]) -> InvalidRequest:
    descriptor = getattr(getattr(parser, "__self__", None), "DESCRIPTOR", None)
    name = getattr(descriptor, "full_name", "message of this method")
    return InvalidRequest(
        f"the message is no {name}: send it as the proto defines it, with texts in UTF-8",
        reason="MALFORMED_MESSAGE",
    )


def _well_formed(message: Any) -> Any:
    if isinstance(message, _Malformed):
        raise message.error
    return message


def _of_stream(behavior: Handler) -> Handler:
    """A handler whose requests are checked one by one."""

    async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            yield _well_formed(request)

    def handle(requests: AsyncIterator[Any], context: Context) -> Any:
        return behavior(checked(requests), context)

    return handle


def _call(behavior: Handler) -> Handler:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await behavior(_well_formed(request), context)
        except Exception as error:
            await abort(context, error)

    return call


def _stream(behavior: Handler) -> Handler:
    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            responses = behavior(_well_formed(request), context)
            if inspect.isawaitable(responses):  # it writes to the context itself, as health does
                await responses
                return
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except Exception as error:
            await abort(context, error)

    return stream
