"""Every error that crosses the wire. Nothing here needs gRPC.

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

A server raises these classes. rich_status.py writes an error as a google.rpc.Status and turns a
failed call back into the class that the server raised.
"""

from enum import IntEnum
from typing import ClassVar

RETRY_AFTER_S = 1.0
"""When to try again where nothing tells a better time."""
DUPLICATE_RUNNER = "DUPLICATE_RUNNER"
"""A router's reason to refuse a heartbeat: another live process has the runner's id."""


class Code(IntEnum):
    """The numbers of google.rpc.Code that our errors have. gRPC's own status codes are equal."""

    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class GranatumError(Exception):
    """An error with a status code, a machine-readable reason and a message that says what to do."""

    code: ClassVar[Code] = Code.UNKNOWN

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


class InvalidRequest(GranatumError):
    """A field of the request is wrong."""

    code = Code.INVALID_ARGUMENT


class InvalidAdapter(InvalidRequest):
    """An upload cannot be served; the message names file, tensor and reason."""


class Unauthenticated(GranatumError):
    """No key, or an unknown one."""

    code = Code.UNAUTHENTICATED


class PermissionDenied(GranatumError):
    """A known key that may not do this."""

    code = Code.PERMISSION_DENIED


class NotFound(GranatumError):
    """No such thing, or none that the caller may see."""

    code = Code.NOT_FOUND


class AlreadyExists(GranatumError):
    """The name or request id is taken."""

    code = Code.ALREADY_EXISTS


class PreconditionFailed(GranatumError):
    """Not in this state."""

    code = Code.FAILED_PRECONDITION


class Overloaded(GranatumError):
    """A queue, quota or limit is full; try later."""

    code = Code.RESOURCE_EXHAUSTED


class Unavailable(GranatumError):
    """A part of the system is away; try again."""

    code = Code.UNAVAILABLE


class DeadlineExceeded(GranatumError):
    """The caller's deadline passed."""

    code = Code.DEADLINE_EXCEEDED


class Internal(GranatumError):
    """Our bug."""

    code = Code.INTERNAL


def class_of(code: int) -> type[GranatumError]:
    """The class of a google.rpc.Code. A code without a class becomes Internal."""
    return _BY_CODE.get(code, Internal)


def from_code(
    code: int, message: str, reason: str | None = None, field: str | None = None
) -> GranatumError:
    """The error of a google.rpc.Code, as one process reports it to another."""
    return class_of(code)(message, reason=reason or None, field=field or None)


def _screaming(name: str) -> str:
    """`InvalidAdapter` as `INVALID_ADAPTER`."""
    return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


_BY_CODE: dict[int, type[GranatumError]] = {
    kind.code: kind for kind in GranatumError.__subclasses__()
}
