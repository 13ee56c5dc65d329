"""What clients are told of adapters that cannot be had."""

from google.rpc import code_pb2

from granatum.runner.adapters.residency import failure_of
from granatum.v1.errors import InvalidAdapter


def test_our_own_errors_are_told_whole() -> None:
    failure = failure_of(InvalidAdapter("rank 512 is too large", field="adapter"))
    assert (failure.code, failure.field) == (code_pb2.INVALID_ARGUMENT, "adapter")
    assert failure.message == "rank 512 is too large"


def test_foreign_errors_stay_in_the_log() -> None:
    failure = failure_of(PermissionError("/var/secret/cache"))
    assert failure.code == code_pb2.INTERNAL
    assert "secret" not in failure.message
