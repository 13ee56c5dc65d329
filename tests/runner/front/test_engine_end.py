"""What an engine's end says of its sequences."""

import signal

import pytest

from granatum.runner.front.engine_end import EngineEnd, cause_of
from granatum.runner.records import Departure
from granatum.v1.errors import InvalidRequest

LOST, SUSPECTED, BLAMED = Departure.ENGINE_LOST, Departure.SUSPECTED, Departure.BLAMED


@pytest.mark.parametrize("status", [1, 134, *(-s for s in (6, 11, 7, 8, 4))])
def test_failure_points_at_the_sequences_of_the_step_alone(status: int) -> None:
    end = EngineEnd(status, step=(3, 5))
    assert [end.departure_of(number) for number in (3, 4, 5)] == [SUSPECTED, LOST, SUSPECTED]
    assert EngineEnd(status, step=(3,)).departure_of(3) is BLAMED
    assert EngineEnd(status).departure_of(3) is LOST


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_end_from_outside_points_at_nobody(number: int) -> None:
    assert EngineEnd(-number, step=(3,)).departure_of(3) is LOST


def test_engine_that_said_so_failed_by_itself_however_it_ended() -> None:
    assert EngineEnd(-signal.SIGKILL, step=(3,), own=True).departure_of(3) is BLAMED
    assert EngineEnd(0, step=(3, 4), own=True).departure_of(3) is SUSPECTED


def test_operators_are_told_why_and_what_to_do() -> None:
    assert "SIGKILL" in str(EngineEnd(-9))
    assert "memory" in str(EngineEnd(-9))
    assert "SIGSEGV" in str(EngineEnd(-11))
    assert "status 3" in str(EngineEnd(3))
    assert "signal 60" in str(EngineEnd(-60))
    assert str(EngineEnd(1, cause="give it more")) == "give it more"


def test_causes_of_errors() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch has it."""

    assert cause_of(InvalidRequest("the model lacks a tensor")) == "the model lacks a tensor"
    assert "--memory-fraction" in cause_of(OutOfMemoryError("CUDA out of memory.\nTried"))
    assert cause_of(KeyError("x")).startswith("KeyError: 'x'")
