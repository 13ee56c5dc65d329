"""Requests and adapters that break numbers, beside neighbours whose tokens must not change."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig
from structlog.testing import capture_logs
from tiny_models import VOCAB, TinyEngine, Told, make_adapters, make_model

from granatum.runner.engine.scheduling.failures import STEP_FAILED
from granatum.runner.records import Failure, Finish, Sampling, Submit

NAMES = ("good", "huge")
INNOCENT = 3
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its adapters, in the directories base and adapters."""
    path = tmp_path_factory.mktemp("hostile")
    model = make_model(path / "base", "llama_gqa_tied")
    make_adapters(model, dict.fromkeys(NAMES, CONFIG), path / "adapters")
    return path


def tiny_engine(saved: Path) -> TinyEngine:
    """An engine with both adapters, of which one overflows."""
    return TinyEngine(
        saved / "base", saved / "adapters", NAMES, huge=["huge"], max_rank=8, pages=60
    )


@pytest.fixture(scope="module")
def undisturbed(saved: Path) -> dict[int, Told]:
    """What the innocent are told each alone, by id."""
    engine = tiny_engine(saved)
    for submit in innocent():
        engine.run(submit)
    engine.close()
    return engine.told


@pytest.fixture
def engine(saved: Path) -> Iterator[TinyEngine]:
    engine = tiny_engine(saved)
    yield engine
    engine.assert_empty()
    engine.close()


def innocent() -> list[Submit]:
    """Greedy and sampled sequences, with and without an adapter; some outlive the others."""
    samplings = (Sampling(), Sampling(temperature=0.9, seed=3, frequency_penalty=0.3))
    return [
        Submit(
            i,
            tuple(range(2, 5 + 9 * i)),
            adapter=("good", None, "good")[i],
            sampling=samplings[i % 2],
            max_tokens=10 + 4 * i,
            top_logprobs=i,
        )
        for i in range(INNOCENT)
    ]


HUGE = Sampling(repetition_penalty=1e-40)
HOSTILE = {
    "adapter": Submit(90, (1, 2, 3), adapter="huge", max_tokens=30),
    "long prompt of the adapter": Submit(90, (7,) * 150, adapter="huge", max_tokens=30),
    "adapter, sampled": Submit(
        90, (1, 2), adapter="huge", sampling=Sampling(temperature=1.0), max_tokens=9, top_logprobs=3
    ),
    "penalty": Submit(90, tuple(range(VOCAB)), sampling=HUGE, max_tokens=30),
    "penalty, sampled": Submit(
        90, tuple(range(VOCAB)), sampling=Sampling(1.0, repetition_penalty=1e-40), max_tokens=30
    ),
    "every token masked": Submit(
        90, (1, 2), stop_ids=frozenset(range(VOCAB)), min_tokens=5, max_tokens=30
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_finite_ends_its_own_sequence_alone(
    name: str, engine: TinyEngine, undisturbed: dict[int, Told]
) -> None:
    for submit in innocent():
        engine.submit(submit)
    for _ in range(4):
        engine.step()
    hostile = HOSTILE[name]
    told = engine.run(hostile)
    failure = told[90].outcome
    assert isinstance(failure, Failure)
    assert (failure.code, failure.reason, told[90].tokens) == (9, "LOGITS_NOT_FINITE", [])
    assert "generated token 1 " in failure.message
    assert ("adapter" in failure.message) == (hostile.adapter is not None)
    for i, alone in undisturbed.items():
        assert told[i].outcome is Finish.LENGTH
        assert told[i].tokens == alone.tokens
        chosen = [[entry.chosen for entry in x.logprobs] for x in (told[i], alone)]
        assert chosen[0] == pytest.approx(chosen[1], abs=1e-3)


def test_pages_and_seats_of_what_was_not_finite_are_clean_for_the_next(
    engine: TinyEngine, undisturbed: dict[int, Told]
) -> None:
    """The next sequences have its pages, and seats, in whose last tokens and counts it was."""
    filthy = [
        Submit(200 + i, (7,) * 40, adapter="huge", sampling=HUGE, max_tokens=30) for i in range(4)
    ]
    engine.run(*filthy)
    told = engine.run(*innocent())
    assert [told[i].tokens for i in undisturbed] == [t.tokens for t in undisturbed.values()]


def test_memory_that_holds_no_numbers_reaches_nobody(saved: Path) -> None:
    """Pages and workspaces are as whoever had them before left them."""
    found = []
    for value in (0.0, math.nan, math.inf):
        engine = tiny_engine(saved)
        engine.model._arena.pages.fill_(value)
        engine.model._partials.fill_(value)
        engine.model._pieces.partials.fill_(value)
        found.append({i: (t.tokens, t.logprobs) for i, t in engine.run(*innocent()).items()})
        engine.close()
    assert found[1] == found[2] == found[0]


@pytest.mark.parametrize("heat", [1e-39, 1e-45, 3e38])
def test_temperatures_at_the_ends_draw_tokens_of_the_vocabulary(
    engine: TinyEngine, heat: float
) -> None:
    sampling = Sampling(temperature=heat, seed=7)
    told = engine.run(Submit(1, (4, 5), max_tokens=9), Submit(2, (4, 5), (), None, sampling, 9))
    assert all(0 <= token < VOCAB for token in told[2].tokens)
    assert (told[2].tokens == told[1].tokens) == (heat < 1)
    assert told[2].outcome is Finish.LENGTH


def test_stop_ids_beyond_the_vocabulary_never_appear(engine: TinyEngine) -> None:
    """A model's own end token may lie there; users' are refused at the border."""
    free = engine.run(Submit(1, (4, 5), max_tokens=10))[1].tokens
    stops = frozenset({4_000_000_000, VOCAB, free[3]})
    told = engine.run(
        Submit(2, (4, 5), max_tokens=10, min_tokens=2, stop_ids=stops),
        Submit(3, (4, 5), max_tokens=10, min_tokens=9, stop_ids=stops - {free[3]}),
    )
    assert told[2].tokens == free[: free.index(free[3]) + 1] or free.index(free[3]) < 2
    assert told[3].tokens == free


def test_penalties_count_a_failed_steps_token_once(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step counts the token on the device, and fails after that."""
    sampling = Sampling(frequency_penalty=0.8, repetition_penalty=1.3)
    submits = [Submit(i, (4, 5, i), sampling=sampling, max_tokens=25) for i in range(3)]
    expected = {i: told.tokens for i, told in engine.run(*submits).items()}
    executor = engine.engine._executor
    steps = iter(range(1000))

    def fail_once() -> None:  # where a GPU's event would be recorded
        if next(steps) == 4:
            raise RuntimeError("the tokens were drawn and counted, and are lost")

    monkeypatch.setattr(executor, "_mark", fail_once)
    with capture_logs():
        told = engine.run(*submits)
    assert {i: told[i].tokens for i in range(3)} == expected


def test_a_sequence_that_breaks_the_step_ends_and_the_others_go_on(
    engine: TinyEngine, undisturbed: dict[int, Told]
) -> None:
    for submit in innocent():
        engine.submit(submit)
    engine.step()
    with capture_logs():  # no such token: the embedding raises
        told = engine.run(Submit(90, (1, 10**6), max_tokens=5))
    assert told[90].outcome == STEP_FAILED
    assert [told[i].tokens for i in undisturbed] == [t.tokens for t in undisturbed.values()]
