"""Every error that crosses the wire, and how it crosses.

    GranatumError
    ├── InvalidRequest          INVALID_ARGUMENT      a field of the request is wrong
    │   └── InvalidAdapter      INVALID_ARGUMENT      an upload cannot be served
    ├── Unauthenticated         UNAUTHENTICATED       no key, or an unknown one
    ├── PermissionDenied        PERMISSION_DENIED     a known key that may not do this
    ├── NotFound                NOT_FOUND             no such thing, or none that the caller may see
    ├── AlreadyExists           ALREADY_EXISTS        the name or request id is taken
    ├── PreconditionFailed      FAILED_PRECONDITION   not in this state
    ├── Overloaded              RESOURCE_EXHAUSTED    a queue, quota or limit is full; try later
    ├── Unavailable             UNAVAILABLE           a part of the system is away; try again
    ├── DeadlineExceeded        DEADLINE_EXCEEDED     the caller's deadline passed
    └── Internal                INTERNAL              our bug

A server raises these and `ErrorInterceptor` (error_interceptor.py) sends them; a client turns an
`grpc.aio.AioRpcError` back into the same class with `from_rpc_error`.
"""

from typing import ClassVar, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "granatum"
RETRY_AFTER_S = 1.0
"""When to try again where nothing tells a better time."""

D = TypeVar("D", bound=Message)


class GranatumError(Exception):
    """An error with a gRPC status, a machine-readable reason and a message that says what to do."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after_s: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or _screaming(type(self).__name__)
        self.retry_after_s = retry_after_s
        self.field = field

    def to_status(self) -> status_pb2.Status:
        """The error as a google.rpc.Status: ErrorInfo; RetryInfo when a retry may help.

        BadRequest names the field that is wrong, where one is.
        """
        details = [_pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN))]
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_after_s * 1000))
            details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
        return status_pb2.Status(code=self.code, message=self.message, details=details)

    @property
    def code(self) -> int:
        """The status as a google.rpc.Code number."""
        number: int = self.status.value[0]
        return number


class InvalidRequest(GranatumError):
    """A field of the request is wrong."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class InvalidAdapter(InvalidRequest):
    """An upload cannot be served; the message names file, tensor and reason."""


class Unauthenticated(GranatumError):
    """No key, or an unknown one."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(GranatumError):
    """A known key that may not do this."""

    status = grpc.StatusCode.PERMISSION_DENIED


class NotFound(GranatumError):
    """No such thing, or none that the caller may see."""

    status = grpc.StatusCode.NOT_FOUND


class AlreadyExists(GranatumError):
    """The name or request id is taken."""

    status = grpc.StatusCode.ALREADY_EXISTS


class PreconditionFailed(GranatumError):
    """Not in this state."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Overloaded(GranatumError):
    """A queue, quota or limit is full; try later."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(GranatumError):
    """A part of the system is away; try again."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(GranatumError):
    """The caller's deadline passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Internal(GranatumError):
    """Our bug."""

    status = grpc.StatusCode.INTERNAL


def from_code(
    code: int, message: str, reason: str | None = None, field: str | None = None
) -> GranatumError:
    """The error of a google.rpc.Code, as one process reports it to another."""
    return _BY_CODE.get(code, Internal)(message, reason=reason or None, field=field or None)


def from_rpc_error(error: grpc.aio.AioRpcError) -> GranatumError:
    """What a server raised, from what the client's stub raised."""
    packed = _packed_details(error)
    info = _unpacked(packed, error_details_pb2.ErrorInfo)
    reason = info.reason if info else None
    kind = _BY_CODE.get(error.code().value[0], Internal)
    if reason == "INVALID_ADAPTER":
        kind = InvalidAdapter
    elif error.code() is grpc.StatusCode.CANCELLED:
        kind = Unavailable  # by the server or the network: a caller's own cancelling raises nothing
    return kind(
        error.details() or error.code().name,
        reason=reason,
        retry_after_s=_retry_after_s(packed, info is None and kind is Unavailable),
        field=_field(packed),
    )


def _retry_after_s(packed: list[any_pb2.Any], nobody_said: bool) -> float | None:
    """As the server says, or where gRPC itself raised the error and no server could say."""
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
        if key == rpc_status.GRPC_DETAILS_METADATA_KEY and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []


def _pack(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _screaming(name: str) -> str:
    """`InvalidAdapter` as `INVALID_ADAPTER`."""
    return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


_BY_CODE: dict[int, type[GranatumError]] = {
    code_pb2.INVALID_ARGUMENT: InvalidRequest,
    code_pb2.UNAUTHENTICATED: Unauthenticated,
    code_pb2.PERMISSION_DENIED: PermissionDenied,
    code_pb2.NOT_FOUND: NotFound,
    code_pb2.ALREADY_EXISTS: AlreadyExists,
    code_pb2.FAILED_PRECONDITION: PreconditionFailed,
    code_pb2.RESOURCE_EXHAUSTED: Overloaded,
    code_pb2.UNAVAILABLE: Unavailable,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceeded,
    code_pb2.INTERNAL: Internal,
}
