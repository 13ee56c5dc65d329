"""Bulkheads of the engine: faults injected into its steps, over a toy executor."""

import random
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs
from toy_executor import Bench, ToyExecutor, crowd, failing, holds
from toy_model import VOCABULARY, expected

from granatum.runner.engine.engine import MOST_UNPLANNED, EngineLost
from granatum.runner.engine.scheduling.failures import STEP_FAILED
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.records import Departure, Finish, Submit


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What the engine logs; rendering it takes longer than the tests."""
    with capture_logs() as entries:
        yield entries


@pytest.mark.parametrize("length", [0, 4, 9])
@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_fault_ends_its_sequence_and_no_other(
    where: str, length: int, logs: list[MutableMapping[str, Any]]
) -> None:
    fault = holds(2, length)
    executor = failing(where, fault)
    bench = Bench(executor)
    bench.run(*crowd())
    for submit in crowd():
        told = bench.tokens[submit.sequence_id]
        if submit.sequence_id == 2:
            assert told == expected(submit)[: len(told)]
            assert bench.outcomes[2] == STEP_FAILED
        else:
            assert told == expected(submit)
            assert bench.outcomes[submit.sequence_id] is Finish.LENGTH
    assert bench.pool.free_pages == bench.pool.total
    failed = [plan for plan in executor.plans if fault(plan)]
    assert [plan.solo for plan in failed if plan.solo] == [True]
    reports = [entry for entry in logs if entry["event"] == "a step failed"]
    assert [2 in entry["sequences"] for entry in reports] == [True, True]
    assert [entry["alone"] for entry in reports] == [False, True]


def test_a_fault_that_passes_harms_nobody() -> None:
    broken = iter([False, False, False, True])
    bench = Bench(ToyExecutor(fails_launch=lambda _: next(broken, False)))
    bench.run(*crowd())
    assert bench.tokens == {s.sequence_id: expected(s) for s in crowd()}
    assert set(bench.outcomes.values()) == {Finish.LENGTH}


def test_a_fault_of_two_together_lets_both_go_on() -> None:
    """Neither fails alone; after a few common failures they are kept apart for good."""

    def together(plan: Plan) -> bool:
        return {1, 2} <= {span.sequence.id for span in plan.spans}

    executor = ToyExecutor(fails_wait=together)
    bench = Bench(executor)
    bench.run(*crowd(tokens=40))
    assert bench.tokens == {s.sequence_id: expected(s) for s in crowd(tokens=40)}
    assert 1 <= sum(map(together, executor.plans)) <= 6


@pytest.mark.parametrize("seed", range(40))
def test_any_faults_leave_the_innocent_as_they_would_be(seed: int) -> None:
    rng = random.Random(seed)
    limits = EngineLimits(rng.randint(1, 6), 100, rng.randint(6, 20), rng.choice([1, 4]), 64)
    submits = [
        Submit(
            i,
            tuple(rng.choices(range(VOCABULARY), k=rng.randint(1, 20))),
            max_tokens=rng.randint(1, 20),
            suspicion=rng.choice([0, 0, 0, 1, 2]),
            priority=rng.choice([0, 0, 1]),
        )
        for i in range(20)
    ]
    launch = [holds(i, rng.randint(0, 30)) for i in rng.sample(range(20), 2)]
    wait = [holds(i, rng.randint(0, 30)) for i in rng.sample(range(20), 2)]
    executor = ToyExecutor(lambda p: any(f(p) for f in launch), lambda p: any(f(p) for f in wait))
    bench = Bench(executor, limits)
    for submit in submits:
        bench.submit(submit)
        for _ in range(rng.choice([0, 1, 3])):
            bench.step()
    for i in rng.sample(range(20), 2):
        bench.engine.cancel(i)
        bench.outcomes.setdefault(i, None)
    bench.run()
    for submit in submits:
        told, outcome = bench.tokens[submit.sequence_id], bench.outcomes[submit.sequence_id]
        assert told == expected(submit)[: len(told)]
        assert outcome in (Finish.LENGTH, STEP_FAILED, None)
        assert told == expected(submit) or outcome is not Finish.LENGTH
    failed = {i for i, outcome in bench.outcomes.items() if outcome == STEP_FAILED}
    assert failed <= {
        i for i in range(20) for p in executor.plans if p.solo and p.spans[0].sequence.id == i
    }
    assert len(failed) <= 4
    assert bench.pool.free_pages == bench.pool.total


def test_a_suspect_of_others_is_computed_alone_for_a_while_or_always() -> None:
    executor = ToyExecutor()
    bench = Bench(executor)
    once, twice = (Submit(8 + n, (1, 2), max_tokens=40, suspicion=n) for n in (1, 2))
    bench.run(*crowd(2, tokens=60)[:2], once, twice)
    assert bench.tokens[9] == expected(once)
    assert bench.tokens[10] == expected(twice)
    steps = {
        i: [p.solo for p in executor.plans if i in [s.sequence.id for s in p.spans]]
        for i in (0, 9, 10)
    }
    assert steps[9] == [True] * 16 + [False] * 24
    assert steps[10] == [True] * 40
    assert not any(steps[0])
    longest = max(len(run) for run in "".join("x."[p.solo] for p in executor.plans[:80]).split("x"))
    assert longest == 1, "suspects and the others take turns"


def test_nobody_shares_the_device_with_a_suspect() -> None:
    seen: list[tuple[bool, tuple[int, ...]]] = []
    executor = ToyExecutor()
    bench = Bench(executor)
    executor.before_launch = lambda plan: seen.append((plan.solo, bench.recorder.read()))
    bench.run(*crowd(3), Submit(9, (1,), max_tokens=5, suspicion=2))
    assert {ids for solo, ids in seen if solo} == {(9,)}
    assert (False, (0, 1, 2)) in seen
    assert bench.recorder.read() == ()


def test_rows_that_are_not_finite_end_their_sequence() -> None:
    bench = Bench(ToyExecutor(unsound=frozenset({1, 4})))
    bench.run(*crowd(4), Submit(4, (1,), adapter="3", max_tokens=9))
    assert bench.tokens[1] == bench.tokens[4] == []
    for i, cause in ((1, "base model"), (4, "adapter")):
        outcome = bench.outcomes[i]
        assert (outcome.code, outcome.reason) == (9, "LOGITS_NOT_FINITE")  # type: ignore[attr-defined]
        assert cause in outcome.message  # type: ignore[attr-defined]
    for submit in (crowd(4)[i] for i in (0, 2, 3)):
        assert bench.tokens[submit.sequence_id] == expected(submit)
    assert bench.pool.free_pages == bench.pool.total


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_lost_device_ends_the_engine_and_names_what_it_computed(where: str) -> None:
    executor = failing(where, holds(2, 8))
    executor.lost = True
    bench = Bench(executor)
    with pytest.raises(EngineLost) as lost:
        bench.run(*crowd(3))
    assert set(lost.value.sequences) == {0, 1, 2}
    assert set(bench.recorder.read()) == {0, 1, 2}


def test_a_probe_that_fails_ends_the_engine() -> None:
    with pytest.raises(EngineLost):
        Bench(ToyExecutor(lost=True)).engine.probe()


def test_a_sequence_that_cannot_be_planned_ends_alone() -> None:
    bench = Bench(ToyExecutor())
    bench.run(*crowd(2), Submit(5, (1, 2), adapter="7", max_tokens=3))
    assert bench.outcomes[5] == STEP_FAILED
    assert [bench.tokens[i] for i in (0, 1)] == [expected(s) for s in crowd(2)]


def test_copies_that_fail_for_a_while_harm_nobody_and_for_good_end_the_engine() -> None:
    bench = Bench(ToyExecutor())
    bench.submit(*crowd(2))
    bench.step()
    bench.adapters.fails_poll = True
    for _ in range(MOST_UNPLANNED - 1):
        bench.step()
    bench.adapters.fails_poll = False
    bench.run()
    assert [bench.tokens[i] for i in (0, 1)] == [expected(s) for s in crowd(2)]
    bench.adapters.fails_poll = True
    with pytest.raises(EngineLost):
        bench.run(*crowd(1))


def test_a_sequence_that_cannot_be_queued_or_cancelled_ends_alone() -> None:
    bench = Bench(ToyExecutor())
    bench.submit(*crowd(2))
    bench.submit(Submit(5, (1,), max_tokens=3, priority="high"))  # type: ignore[arg-type]
    bench.submit(Submit(6, (1,), adapter="13", max_tokens=30))
    bench.engine.cancel(6)
    bench.step()
    bench.engine.cancel(6)
    bench.run()
    assert bench.outcomes == {0: Finish.LENGTH, 1: Finish.LENGTH, 5: STEP_FAILED}


def test_a_failed_step_gives_no_pages_away_while_draining() -> None:
    bench = Bench(ToyExecutor(fails_wait=holds(1, 6)))
    bench.submit(*crowd(3))
    for _ in range(3):
        bench.step()
    bench.engine.set_draining(True)
    bench.run()
    assert set(bench.outcomes.values()) == {Departure.DRAINED}
    assert bench.pool.free_pages == bench.pool.total


def test_figures_tell_the_adapters_trouble() -> None:
    assert Bench(ToyExecutor()).engine.figures.load_trouble == "the disk is full"
