"""The scheduler against a simulated engine that runs one step ahead; microseconds, no torch."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from toy_engine import ToyEngine, limits
from toy_model import expected

from granatum.runner.adapters.residency import NoAdapters
from granatum.runner.engine.scheduling.scheduler import Scheduler
from granatum.runner.pages import PagePool
from granatum.runner.records import Departure, Failure, Finish, SequenceNews, Submit
from granatum.v1.errors import InvalidAdapter, InvalidRequest, NotFound, Unavailable

STOP = 7


def test_a_sequence_runs_to_its_length() -> None:
    engine = ToyEngine(limits(), 20)
    submit = Submit(1, tuple(range(23)), max_tokens=9)
    engine.submit(submit)
    engine.run()
    assert engine.tokens[1] == expected(submit)
    assert engine.outcomes[1] is Finish.LENGTH
    engine.assert_empty()


def test_a_prompt_comes_in_chunks_beside_decodes() -> None:
    engine = ToyEngine(limits(), 40)
    engine.submit(Submit(1, (1,), max_tokens=20))
    engine.step()
    engine.submit(Submit(2, tuple(range(40)), max_tokens=3))
    for _ in range(4):
        engine.step()
    assert [(len(p.decodes), [c.rows for c in p.chunks]) for p in engine.plans[1:5]] == [
        (1, [15]),
        (1, [15]),
        (1, [10]),
        (2, []),
    ]


def test_tokens_of_a_stop_found_late_are_dropped() -> None:
    submit = Submit(1, (3, 4), max_tokens=50, stop_ids=frozenset(range(0, 50, 6)), min_tokens=2)
    engine = ToyEngine(limits(), 20)
    engine.submit(submit)
    engine.run()
    assert engine.tokens[1] == expected(submit)
    assert engine.outcomes[1] is Finish.STOP
    engine.assert_empty()


def test_a_resumed_sequence_goes_on() -> None:
    whole = Submit(1, (5, 6, 7), max_tokens=12)
    made = expected(whole)
    engine = ToyEngine(limits(), 20)
    engine.submit(Submit(1, (5, 6, 7), generated=tuple(made[:5]), max_tokens=12))
    engine.submit(Submit(2, (5, 6, 7), generated=tuple(made), max_tokens=12))
    engine.run()
    assert engine.tokens[1] == made[5:]
    assert engine.tokens[2] == []
    assert engine.outcomes[2] is Finish.LENGTH


@pytest.mark.parametrize("state", ["idle", "draining", "full", "of few pages"])
def test_a_sequence_resumed_after_its_last_token_is_over_at_once(state: str) -> None:
    engine = ToyEngine(limits(max_batch=1, max_waiting=0), 2 if state == "of few pages" else 20)
    if state == "full":
        engine.submit(Submit(0, (1,), max_tokens=40))
    engine.scheduler.set_draining(state == "draining")
    prompt, made = (5, 6, 7), (9, 8, 9, 8, 9, 4)
    resumed = Submit(1, prompt, made, max_tokens=6)
    engine.submit(resumed)
    engine.submit(replace(resumed, sequence_id=2, stop_ids=frozenset({4})))
    engine.submit(replace(resumed, sequence_id=3, stop_ids=frozenset({4}), max_tokens=40))
    engine.hear(engine.scheduler.take_news())
    assert engine.outcomes == {1: Finish.LENGTH, 2: Finish.STOP, 3: Finish.STOP}
    assert engine.scheduler.sequences == (state == "full")


def test_priority_then_arrival() -> None:
    engine = ToyEngine(limits(max_batch=1), 20)
    for i, priority in enumerate((0, 0, 5)):
        engine.submit(Submit(i, (1, 2), max_tokens=2, priority=priority))
    engine.run()
    assert list(engine.outcomes) == [2, 0, 1]


def test_a_cold_adapter_holds_up_nobody_else() -> None:
    engine = ToyEngine(limits(), 20)
    engine.submit(Submit(1, (1, 2), adapter="1", max_tokens=3))
    engine.submit(Submit(2, (1, 2), max_tokens=3))
    engine.submit(Submit(3, (1, 2), adapter="bad", max_tokens=3))
    engine.run()
    assert list(engine.outcomes) == [3, 2, 1]
    assert engine.outcomes[3] is Departure.LOAD_FAILED
    engine.assert_empty()


def outcome_after(error: Exception) -> SequenceNews:
    """What is said of a sequence whose adapter ends in `error`."""

    class Failing(NoAdapters):
        def acquire(self, digest: str) -> int | None:
            raise error

    scheduler = Scheduler(limits(), PagePool(20), Failing())
    scheduler.submit(Submit(1, (1, 2), adapter="a", max_tokens=3))
    scheduler.schedule()
    assert scheduler.sequences == 0
    (news,) = scheduler.take_news()
    return news


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unavailable("the store is away"), "UNAVAILABLE"),
        (Unavailable("full", reason="ADAPTER_DISK_FULL"), "ADAPTER_DISK_FULL"),
        (NotFound("the store has none"), "NOT_FOUND"),
        (OSError(28, "No space left on device"), "INTERNAL"),
        (AssertionError("a fault of ours"), "INTERNAL"),
        (InvalidAdapter("too high", reason="ADAPTER_RANK_TOO_HIGH"), "ADAPTER_RANK_TOO_HIGH"),
        (InvalidRequest("too large", reason="ADAPTER_TOO_LARGE"), "ADAPTER_TOO_LARGE"),
    ],
)
def test_what_another_runner_may_load_departs_with_its_cause(error: Exception, reason: str) -> None:
    news = outcome_after(error)
    assert news.outcome is Departure.LOAD_FAILED
    assert news.cause is not None
    assert news.cause.reason == reason
    assert "space left" not in news.cause.message
    assert "fault of ours" not in news.cause.message


def test_what_no_runner_can_load_fails() -> None:
    error = InvalidAdapter("it holds NaN")
    news = outcome_after(error)
    assert isinstance(news.outcome, Failure)
    assert (news.outcome.code, news.outcome.message) == (error.code, error.message)
    assert news.cause is None


def test_decodes_are_ordered_by_slot() -> None:
    engine = ToyEngine(limits(max_batch=6), 40)
    for i, adapter in enumerate(("2", None, "1", "2", "1", None)):
        engine.submit(Submit(i, (1, 2), adapter=adapter, max_tokens=20))
    for _ in range(8):
        engine.step()
    assert [s.sequence.slot for s in engine.plans[-1].decodes] == [-1, -1, 1, 1, 2, 2]


def test_idle_adapters_give_way_before_anyone_is_evicted() -> None:
    engine = ToyEngine(limits(), 8)
    engine.submit(Submit(1, (1, 2), adapter="1", max_tokens=2))
    engine.run()
    assert engine.adapters.figures.reclaimable_pages == 2
    engine.submit(Submit(2, tuple(range(20)), max_tokens=11))
    engine.run()
    assert engine.outcomes[2] is Finish.LENGTH
    assert engine.adapters.figures.resident == ()


def test_the_newest_is_evicted_with_its_tokens() -> None:
    engine = ToyEngine(limits(), 8)
    first, second = (Submit(i, tuple(range(i, i + 9)), max_tokens=20) for i in (1, 2))
    engine.submit(first)
    engine.submit(second)
    engine.run()
    assert engine.outcomes == {1: Finish.LENGTH, 2: Departure.EVICTED}
    assert engine.tokens[1] == expected(first)
    made = engine.tokens[2]
    assert made == expected(second)[: len(made)] != []
    engine.assert_empty()


def test_what_can_never_fit_fails_with_a_message() -> None:
    engine = ToyEngine(limits(), 5)
    engine.submit(Submit(1, tuple(range(24)), max_tokens=4))
    engine.submit(Submit(2, tuple(range(18)), max_tokens=20))
    engine.run()
    engine.submit(Submit(3, tuple(range(18)), adapter="1", max_tokens=2))
    engine.submit(Submit(4, (), max_tokens=2))
    engine.submit(Submit(5, tuple(range(64)), max_tokens=2))
    engine.run()
    reasons = {i: getattr(engine.outcomes[i], "reason", None) for i in range(1, 6)}
    assert reasons == {
        1: "SEQUENCE_TOO_LARGE",
        2: "SEQUENCE_TOO_LARGE",
        3: "SEQUENCE_TOO_LARGE",
        4: "PROMPT_LENGTH",
        5: "PROMPT_LENGTH",
    }
    assert len(engine.tokens[2]) == 3
    engine.assert_empty()


def test_a_full_queue_refuses() -> None:
    engine = ToyEngine(limits(max_batch=1, max_waiting=2), 20)
    for i in range(5):
        engine.submit(Submit(i, (1, 2), max_tokens=2))
    engine.run()
    assert [i for i, o in engine.outcomes.items() if o is Departure.REFUSED] == [3, 4]


def test_draining_gives_everything_back_with_its_tokens() -> None:
    engine = ToyEngine(limits(max_batch=1), 20)
    submits = [Submit(i, (1, 2, i), max_tokens=30) for i in range(3)]
    for submit in submits[:2]:
        engine.submit(submit)
    for _ in range(5):
        engine.step()
    engine.scheduler.set_draining(True)
    engine.submit(submits[2])
    engine.run()
    assert engine.outcomes == {
        0: Departure.DRAINED,
        1: Departure.DRAINED,
        2: Departure.REFUSED,
    }
    assert engine.tokens[0] == expected(submits[0])[: len(engine.tokens[0])]
    assert len(engine.tokens[0]) == 5
    engine.scheduler.set_draining(False)
    engine.submit(Submit(9, (1,), max_tokens=1))
    engine.run()
    assert engine.outcomes[9] is Finish.LENGTH
    engine.assert_empty()


def test_cancelled_sequences_say_nothing_more() -> None:
    engine = ToyEngine(limits(max_batch=2), 20)
    for i in range(3):
        engine.submit(Submit(i, (1, 2, 3), adapter="1", max_tokens=30))
    for _ in range(6):
        engine.step()
    before = {i: list(t) for i, t in engine.tokens.items()}
    for i in range(3):
        engine.scheduler.cancel(i)
    engine.scheduler.cancel(99)
    engine.step()
    engine.step()
    assert engine.tokens == before
    assert not engine.outcomes
    assert not engine.scheduler.sequences
    engine.assert_empty()


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_ends_with_the_right_tokens_and_nothing_left(seed: int) -> None:
    rng = random.Random(seed)
    bounds = limits(
        max_batch=rng.randint(1, 6),
        prefill_tokens=rng.randint(6, 20),
        page_tokens=rng.choice([1, 4, 8]),
    )
    engine = ToyEngine(bounds, rng.randint(12, 70))
    submits: dict[int, Submit] = {}
    for number in range(40):
        prompt = tuple(rng.choices(range(50), k=rng.randint(1, 20)))
        submits[number] = Submit(
            number,
            prompt,
            adapter=rng.choice([None, "1", "2", "3", "4"]),
            max_tokens=rng.randint(1, 20),
            stop_ids=frozenset(rng.choices(range(50), k=rng.choice([0, 3]))),
            priority=rng.choice([0, 0, 1]),
        )
        engine.submit(submits[number])
        for _ in range(rng.choice([0, 0, 1, 3])):
            engine.step()
    resumed: dict[int, int] = {}
    for round_ in range(1, 200):  # as a router would: evicted sequences come back
        engine.run()
        evicted = [
            n
            for n, outcome in engine.outcomes.items()
            if outcome is Departure.EVICTED and n not in resumed and n in submits
        ]
        if not evicted:
            break
        for n in evicted:
            old = submits[n]
            again = 1000 * round_ + n
            made = (*old.generated, *engine.tokens[n])
            submits[again] = Submit(
                again,
                old.prompt,
                made,
                old.adapter,
                max_tokens=old.max_tokens,
                stop_ids=old.stop_ids,
                priority=old.priority,
            )
            resumed[n] = again
            engine.submit(submits[again])
    for n, submit in submits.items():
        whole = expected(submit)
        assert engine.tokens[n] == whole[: len(engine.tokens[n])]
        if isinstance(engine.outcomes[n], Finish):
            assert engine.tokens[n] == whole
    engine.assert_empty()


def test_no_torch_in_what_decides() -> None:
    code = (
        "import sys, granatum.runner.engine.scheduling.scheduler; "
        "sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
