"""Sampling in the engine: against transformers' logits processors, and independent of company."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, TinyEngine, make_model, reference_logits
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from granatum.runner.engine.execution.draws import uniform
from granatum.runner.records import Finish, Sampling, Submit

PROMPT = tuple(range(3, 40, 3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("qwen2")
    return path, make_model(path, "qwen2")


@pytest.fixture
def engine(saved: tuple[Path, PreTrainedModel]) -> Iterator[TinyEngine]:
    engine = TinyEngine(saved[0], max_rank=8)
    yield engine
    engine.assert_empty()
    engine.close()


def processed(
    model: PreTrainedModel, tokens: list[int], processors: LogitsProcessorList
) -> torch.Tensor:
    logits: torch.Tensor = processors(
        torch.tensor([tokens]), reference_logits(model, None, tokens)[-1:]
    )
    return logits[0]


def test_greedy_with_repetition_penalty(
    engine: TinyEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    sampling = Sampling(repetition_penalty=1.5)
    tokens = list(PROMPT)
    for token in engine.run(Submit(1, PROMPT, sampling=sampling, max_tokens=30))[1].tokens:
        assert token == int(processed(saved[1], tokens, processors).argmax())
        tokens.append(token)


def test_greedy_with_presence_and_frequency_penalties(
    engine: TinyEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    sampling = Sampling(presence_penalty=0.7, frequency_penalty=0.4)
    submit = Submit(1, PROMPT, sampling=sampling, max_tokens=60)
    tokens = list(PROMPT)
    for token in engine.run(submit)[1].tokens:
        logits = reference_logits(saved[1], None, tokens)[-1]
        counts = torch.bincount(torch.tensor(tokens[len(PROMPT) :]).long(), minlength=VOCAB)
        assert token == int((logits - 0.4 * counts - 0.7 * (counts > 0)).argmax())
        tokens.append(token)


def test_draws_follow_the_filtered_distribution(
    engine: TinyEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    processors = LogitsProcessorList(
        [
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    sampling = Sampling(temperature=1.4, top_k=30, top_p=0.9, min_p=0.02)
    draws = 1200
    told = engine.run(
        *(Submit(i, PROMPT, sampling=replace(sampling, seed=i), max_tokens=1) for i in range(draws))
    )
    counts = torch.bincount(torch.tensor([t.tokens[0] for t in told.values()]), minlength=VOCAB)
    expected = torch.softmax(processed(saved[1], list(PROMPT), processors), -1)
    assert not counts[expected == 0].any()
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 4.5 * deviation).all()


def test_a_draw_is_the_inverse_of_the_distribution_at_its_uniform(
    engine: TinyEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    submit = Submit(1, PROMPT, sampling=Sampling(temperature=1.0, seed=77), max_tokens=20)
    tokens = list(PROMPT)
    for token in engine.run(submit)[1].tokens:
        probabilities = reference_logits(saved[1], None, tokens)[-1].double().softmax(-1)
        below = probabilities.cumsum(-1)
        drawn = uniform(77, len(tokens))
        assert below[token] > drawn - 1e-6
        assert below[token] - probabilities[token] < drawn + 1e-6
        tokens.append(token)


def test_company_changes_nothing(engine: TinyEngine, saved: tuple[Path, PreTrainedModel]) -> None:
    kinds = [
        Sampling(),
        Sampling(temperature=0.8, seed=1),
        Sampling(temperature=1.5, top_p=0.8, seed=2, frequency_penalty=0.5),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.0, min_p=0.1, top_k=5, seed=3, presence_penalty=-0.5),
    ]
    submits = [
        Submit(i, PROMPT[: i + 1], sampling=s, max_tokens=25, top_logprobs=i)
        for i, s in enumerate(kinds)
    ]
    together = engine.run(*submits)
    for submit in submits:
        alone = TinyEngine(saved[0], max_rank=8)
        told = alone.run(submit)[submit.sequence_id]
        assert told.tokens == together[submit.sequence_id].tokens
        alone.close()


def test_seats_do_not_remember_whom_they_held(engine: TinyEngine) -> None:
    sampling = Sampling(frequency_penalty=2.0, repetition_penalty=1.8)
    submit = Submit(1, PROMPT, sampling=sampling, max_tokens=20)
    first = engine.run(submit)[1].tokens
    engine.run(*(replace(submit, sequence_id=i, prompt=PROMPT[i:]) for i in range(2, 9)))
    assert engine.run(submit)[1].tokens == first


def test_min_tokens_and_stop_ids(engine: TinyEngine, saved: tuple[Path, PreTrainedModel]) -> None:
    free = engine.run(Submit(0, PROMPT, max_tokens=12))[0].tokens
    stops = frozenset(free[2:4])
    stopped = engine.run(Submit(1, PROMPT, max_tokens=12, stop_ids=stops))[1]
    first = min(free.index(stop) for stop in stops)
    assert stopped.tokens == free[: first + 1]
    assert stopped.outcome is Finish.STOP
    late = engine.run(Submit(2, PROMPT, max_tokens=12, stop_ids=stops, min_tokens=6))[2]
    minimum = MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, sorted(stops), device="cpu")
    tokens = list(PROMPT)
    for token in late.tokens:
        assert token == int(processed(saved[1], tokens, LogitsProcessorList([minimum])).argmax())
        tokens.append(token)


def test_logprobs_are_those_of_the_model_whatever_the_sampling(
    engine: TinyEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    sampling = Sampling(temperature=2.0, top_k=10, seed=4, repetition_penalty=1.4)
    submit = Submit(1, PROMPT, sampling=sampling, max_tokens=15, top_logprobs=3)
    told = engine.run(submit, Submit(2, PROMPT, max_tokens=15), Submit(3, PROMPT, max_tokens=1))[1]
    expected = reference_logits(saved[1], None, [*PROMPT, *told.tokens]).log_softmax(-1)
    assert len(told.logprobs) == 15
    assert not engine.told[2].logprobs
    for row, token, entry in zip(
        expected[len(PROMPT) - 1 :], told.tokens, told.logprobs, strict=False
    ):
        assert entry.chosen == pytest.approx(float(row[token]), abs=1e-3)
        values, ids = row.topk(3)
        assert [t for t, _ in entry.top] == ids.tolist()
        assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_uniforms_are_uniform_and_differ() -> None:
    drawn = torch.tensor([[uniform(seed, at) for at in range(200)] for seed in range(200)])
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert ((counts - 2000).abs() < 4.5 * 2000**0.5).all()
    across = torch.corrcoef(drawn)[~torch.eye(200, dtype=torch.bool)]
    along = torch.corrcoef(drawn.T)[~torch.eye(200, dtype=torch.bool)]
    assert float(across.abs().max()) < 0.4
    assert float(along.abs().max()) < 0.4
