"""What counts against a sequence, and where it is not to go next."""

import asyncio

import pytest
from router_box import Box, whole
from scripted_runner import Script

from granatum.router.streams.setbacks import FailedLoads, Setbacks
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
    assert setbacks.avoided(1) == {"a", "b"}
    assert setbacks.avoided(10) == {"a"}
    assert setbacks.avoided(31) == set()


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


async def test_streams_that_sat_on_runner_after_runner_killed_from_outside_survive(
    box: Box,
) -> None:
    moves = 6
    await box.router()
    fleet = [await box.runner(f"{n:02}", script=Script(stalled=True)) for n in range(moves)]
    streams = asyncio.create_task(box.generate_many(3, 20))
    for doomed in reversed(fleet):  # the highest id comes first
        async with asyncio.timeout(10):
            while len(doomed.active) < 3:
                await asyncio.sleep(0.005)
        if doomed is fleet[0]:
            await box.runner("last")
        await doomed.die()
        doomed.active.clear()
    answers = await streams
    whole(box, answers, 20)
    assert {answer.resumptions for answer in answers.values()} == {moves}


async def test_engines_lost_count_nothing(box: Box) -> None:
    await box.router()
    runner = await box.runner("a", script=Script(depart=DEPARTURE_ENGINE_LOST))
    stream = asyncio.create_task(box.generate("hello"))
    async with asyncio.timeout(15):
        while len(runner.submissions) < 10:
            await asyncio.sleep(0.01)
    runner.script.depart = None
    whole(box, {"hello": await stream}, 20)
    assert {s.suspicion for s in runner.submissions} == {0}


async def test_suspicion_travels_with_the_sequence(box: Box) -> None:
    await box.router()
    for id_ in "abc":
        await box.runner(id_, script=Script(depart=DEPARTURE_SUSPECTED))
    box.runners["a"].script.depart = None
    whole(box, {"hello": await box.generate("hello")}, 20)
    sent = [box.runners[id_].submissions[0].suspicion for id_ in "cba"]
    assert sent == [0, 1, 2]


async def test_the_second_engine_that_blames_a_sequence_ends_it(box: Box) -> None:
    await box.router()
    for id_ in "abcd":
        await box.runner(id_, script=Script(depart=DEPARTURE_BLAMED))
    error = await box.error_of("poison")
    assert isinstance(error, Internal)
    assert error.reason == "SEQUENCE_BLAMED"
    assert sum(len(runner.submissions) for runner in box.runners.values()) == 2
    await box.idle()


async def test_a_runner_that_cannot_load_is_left_for_one_that_can(box: Box) -> None:
    await box.router()
    cause = SequenceFailure(code=14, message="the disk is full", reason="DISK_FULL")
    await box.runner("a")
    ill = await box.runner("b", script=Script(depart=DEPARTURE_LOAD_FAILED, fail=cause))
    for n in range(6):
        answer = await box.generate(f"prompt {n}")
        whole(box, {f"prompt {n}": answer}, 20)
        assert answer.responses[-1].end.runner_id == "a"
    assert len(ill.submissions) == 1


@pytest.mark.parametrize("runners", ["a", "ab", "abcde"])
async def test_what_no_runner_can_load_is_told_by_its_cause(box: Box, runners: str) -> None:
    await box.router()
    cause = SequenceFailure(code=3, message="rank 128 is too high", reason="RANK", field="adapter")
    for id_ in runners:
        await box.runner(id_, script=Script(depart=DEPARTURE_LOAD_FAILED, fail=cause))
    error = await box.error_of("hello")
    assert isinstance(error, InvalidRequest)
    assert (error.message, error.reason, error.field) == (cause.message, "RANK", "adapter")
    assert sum(len(runner.submissions) for runner in box.runners.values()) <= 3
    await box.idle()
