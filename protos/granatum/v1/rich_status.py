"""Our errors as rich gRPC statuses: google.rpc.Status with its standard details, and back."""

from typing import TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from granatum.v1.errors import (
    RETRY_AFTER_S,
    GranatumError,
    InvalidAdapter,
    Unavailable,
    class_of,
)

DOMAIN = "granatum"
_DETAILS = "grpc-status-details-bin"
"""The key of gRPC's trailing metadata that holds a serialized google.rpc.Status."""

D = TypeVar("D", bound=Message)


def to_status(error: GranatumError) -> status_pb2.Status:
    """The error with an ErrorInfo, and a RetryInfo where a retry may help.

    A BadRequest names the wrong field, where the error names one.
    """
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    return status_pb2.Status(code=error.code, message=error.message, details=details)


def from_rpc_error(error: grpc.aio.AioRpcError) -> GranatumError:
    """The error that a server raised, from the exception that the client's stub raised."""
    packed = _packed_details(error)
    info = _unpacked(packed, error_details_pb2.ErrorInfo)
    reason = info.reason if info else None
    kind = class_of(error.code().value[0])
    if reason == "INVALID_ADAPTER":
        kind = InvalidAdapter
    elif error.code() is grpc.StatusCode.CANCELLED:
        # The server or the network cancelled: a caller's own cancelling raises no AioRpcError.
        kind = Unavailable
    return kind(
        error.details() or error.code().name,
        reason=reason,
        retry_after_s=_retry_after_s(packed, info is None and kind is Unavailable),
        field=_field(packed),
    )


def _retry_after_s(packed: list[any_pb2.Any], nobody_said: bool) -> float | None:
    """The server's hint. If gRPC itself raised the error (`nobody_said`), RETRY_AFTER_S."""
    retry = _unpacked(packed, error_details_pb2.RetryInfo)
    if retry is not None:
        return float(retry.retry_delay.ToMilliseconds()) / 1000
    return RETRY_AFTER_S if nobody_said else None


def _field(packed: list[any_pb2.Any]) -> str | None:
    bad = _unpacked(packed, error_details_pb2.BadRequest)
    return bad.field_violations[0].field if bad and bad.field_violations else None


def _unpacked(packed: list[any_pb2.Any], kind: type[D]) -> D | None:
    """The first detail of a kind."""
    for detail in packed:
        found = kind()
        if detail.Unpack(found):
            return found
    return None


def _packed_details(error: grpc.aio.AioRpcError) -> list[any_pb2.Any]:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []


def _pack(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
