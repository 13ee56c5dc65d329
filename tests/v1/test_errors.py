"""Errors across the wire and back."""

import grpc
import pytest
from grpc_status import rpc_status

from granatum.v1.errors import (
    Code,
    GranatumError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    from_code,
)
from granatum.v1.rich_status import from_rpc_error, to_status


def received(code: grpc.StatusCode, error: GranatumError | None = None) -> GranatumError:
    """What a client makes of a status with this error's details, or with none."""
    trailing = rpc_status.to_status(to_status(error)).trailing_metadata if error else ()
    metadata = grpc.aio.Metadata(*trailing)
    return from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="gone"))


def test_the_field_and_the_hint_come_back() -> None:
    error = received(
        grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest("top_p: too high", field="sampling.top_p")
    )
    assert (type(error), error.field, error.retry_after_s) == (
        InvalidRequest,
        "sampling.top_p",
        None,
    )
    error = received(
        grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded("full", reason="FULL", retry_after_s=2.5)
    )
    assert (type(error), error.reason, error.retry_after_s) == (Overloaded, "FULL", 2.5)


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE])
def test_what_no_server_explained_may_be_tried_again(code: grpc.StatusCode) -> None:
    error = received(code)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s


def test_a_server_that_gives_no_hint_is_taken_at_its_word() -> None:
    error = received(grpc.StatusCode.UNAVAILABLE, Unavailable("lost", reason="RUNNERS_LOST"))
    assert (error.reason, error.retry_after_s) == ("RUNNERS_LOST", None)


def test_a_code_of_another_process_keeps_its_field() -> None:
    error = from_code(Code.INVALID_ARGUMENT, "stop.token_ids: too large", "", "stop.token_ids")
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.reason) == ("stop.token_ids", "INVALID_REQUEST")
