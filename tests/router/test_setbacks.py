"""What counts against a sequence, and where it is not to go next."""

import pytest

from granatum.router.setbacks import FailedLoads, Setbacks
from granatum.v1.errors import GranatumError, Internal, InvalidRequest, Unavailable
from granatum.v1.runner_pb2 import (
    DEPARTURE_BLAMED,
    DEPARTURE_ENGINE_LOST,
    DEPARTURE_LOAD_FAILED,
    DEPARTURE_REFUSED,
    DEPARTURE_SUSPECTED,
    Departure,
    SequenceFailure,
    SequenceOutput,
)

CAUSE = SequenceFailure(code=3, message="the adapter is damaged", reason="BAD", field="adapter")


def out(departure: Departure.ValueType) -> SequenceOutput:
    failed = departure == DEPARTURE_LOAD_FAILED
    return SequenceOutput(departed=departure, cause=CAUSE if failed else None)


def test_losses_in_company_and_innocent_departures_never_end_a_sequence() -> None:
    setbacks = Setbacks()
    for n in range(100):
        setbacks.lost(f"r{n}", n, alone=False)
        setbacks.departed(f"r{n}", out(DEPARTURE_ENGINE_LOST), n)
        setbacks.departed(f"r{n}", out(DEPARTURE_REFUSED), n)
    assert setbacks.suspicion == 0


def test_a_sequence_that_was_alone_on_four_lost_runners_in_a_row_is_given_up() -> None:
    setbacks = Setbacks()
    for n in range(20):
        setbacks.lost("a", n, alone=True)
        setbacks.progressed()
    for n in range(3):
        setbacks.lost("a", n, alone=True)
        setbacks.lost("a", n, alone=False)
    with pytest.raises(Unavailable) as caught:
        setbacks.lost("a", 3, alone=True)
    assert caught.value.reason == "RUNNERS_LOST"


def test_two_blames_in_a_life_end_a_sequence_whatever_came_between() -> None:
    setbacks = Setbacks()
    setbacks.departed("a", out(DEPARTURE_BLAMED), 0)
    setbacks.progressed()
    with pytest.raises(Internal) as caught:
        setbacks.departed("b", out(DEPARTURE_BLAMED), 1)
    assert caught.value.reason == "SEQUENCE_BLAMED"
    assert "alone" in caught.value.message


def test_suspicion_grows_and_stays() -> None:
    setbacks = Setbacks()
    for expected in range(1, 10):
        setbacks.departed("a", out(DEPARTURE_SUSPECTED), 0)
        setbacks.progressed()
        assert setbacks.suspicion == expected


@pytest.mark.parametrize("runners", [["a", "b", "c"], ["a", "a"], ["a", "b", "a"]])
def test_failed_loads_end_where_no_other_runner_can_load(runners: list[str]) -> None:
    setbacks = Setbacks()
    *others, last = runners
    for runner in others:
        setbacks.departed(runner, out(DEPARTURE_LOAD_FAILED), 0)
    with pytest.raises(GranatumError) as caught:
        setbacks.departed(last, out(DEPARTURE_LOAD_FAILED), 0)
    assert isinstance(caught.value, InvalidRequest)
    assert (caught.value.message, caught.value.reason, caught.value.field) == (
        CAUSE.message,
        CAUSE.reason,
        CAUSE.field,
    )


def test_exclusions_end() -> None:
    setbacks = Setbacks()
    setbacks.departed("a", out(DEPARTURE_LOAD_FAILED), 0)
    setbacks.departed("a", out(DEPARTURE_REFUSED), 0)
    setbacks.lost("b", 0, alone=False)
    assert setbacks.excluded(1) == {"a", "b"}
    assert setbacks.excluded(10) == {"a"}
    assert setbacks.excluded(31) == set()


def test_delays_grow_and_start_anew_with_a_token() -> None:
    setbacks = Setbacks()
    delays = []
    for n in range(12):
        setbacks.lost("a", n, alone=False)
        delays.append(setbacks.longest_delay)
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert delays[-1] <= 1
    setbacks.progressed()
    assert setbacks.longest_delay == 0


def test_all_streams_know_which_runner_failed_to_load_what() -> None:
    loads = FailedLoads()
    loads.note("a", "sha256:1", 0)
    loads.note("b", "sha256:1", 20)
    assert loads.runners("sha256:1", 21) == {"a", "b"}
    assert loads.runners("sha256:1", 31) == {"b"}
    assert loads.runners("sha256:2", 21) == set()
    for n in range(10_000):
        loads.note("a", f"sha256:{n}", 100 + n)
    assert len(loads._until) <= 31
