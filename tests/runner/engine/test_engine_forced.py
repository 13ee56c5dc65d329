"""Given tokens in the engine: their log probabilities against PEFT, and neighbours' peace."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_models import VOCAB, TinyEngine, Told, make_adapters, make_model, reference_logits

from granatum.runner.records import Departure, Finish, Sampling, Submit

CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
NAMES = ("one", "two")


class Bed:
    """A base model with two adapters, in PEFT and saved for the engine."""

    def __init__(self, path: Path) -> None:
        self.base, self.adapters = path / "base", path / "adapters"
        model = make_model(self.base, "llama3_rope")
        self.reference = make_adapters(model, dict.fromkeys(NAMES, CONFIG), self.adapters)

    def engine(self, **changes: int) -> TinyEngine:
        return TinyEngine(self.base, self.adapters, NAMES, (), max_rank=8, **changes)

    def expected(self, submit: Submit) -> torch.Tensor:
        """PEFT's log probabilities of the given tokens."""
        tokens = [*submit.prompt, *submit.forced]
        rows = reference_logits(self.reference, submit.adapter, tokens).log_softmax(-1)
        given = torch.tensor(submit.forced)
        return rows[len(submit.prompt) - 1 : -1].gather(1, given[:, None])[:, 0]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("forced"))


@pytest.fixture
def engine(bed: Bed) -> Iterator[TinyEngine]:
    engine = bed.engine()
    yield engine
    engine.assert_empty()
    engine.close()


def random_ids(seed: int, number: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCAB, (number,), generator=generator).tolist())


def given(id_: int, adapter: str | None, prompt: int = 9, answer: int = 30) -> Submit:
    """A sequence with its whole output given: random ids, which no model would draw."""
    return Submit(
        id_,
        random_ids(id_, prompt),
        adapter=adapter,
        max_tokens=answer,
        top_logprobs=0,
        forced=random_ids(100 + id_, answer),
    )


def free(id_: int, adapter: str | None, **changes: object) -> Submit:
    submit = Submit(id_, random_ids(id_, 5 + id_), adapter=adapter, max_tokens=20, top_logprobs=2)
    return replace(submit, **changes)  # type: ignore[arg-type]


def chosen(told: Told) -> torch.Tensor:
    return torch.tensor([entry.chosen for entry in told.logprobs])


@pytest.mark.parametrize("adapter", [None, *NAMES])
@pytest.mark.parametrize("prompt", [1, 9, 70])
def test_given_tokens_have_the_log_probabilities_of_peft(
    bed: Bed, engine: TinyEngine, adapter: str | None, prompt: int
) -> None:
    submit = given(1, adapter, prompt)
    told = engine.run(submit)[1]
    assert tuple(told.tokens) == submit.forced
    assert told.outcome is Finish.LENGTH
    torch.testing.assert_close(chosen(told), bed.expected(submit), atol=1e-4, rtol=0)


def test_neighbours_never_notice(bed: Bed, engine: TinyEngine) -> None:
    warm = Sampling(temperature=0.9, seed=3, frequency_penalty=0.3)
    neighbours = (free(10, "one"), free(11, None, sampling=warm), free(12, "two", max_tokens=40))
    scored = (given(1, "one"), given(2, None), given(3, "two", 40))
    with_given = engine.run(*scored, *neighbours)
    # The same rows in the same steps, but drawn.
    other = bed.engine()
    with_drawn = other.run(*(replace(s, forced=()) for s in scored), *neighbours)
    other.close()
    for neighbour in neighbours:
        one, other_told = with_given[neighbour.sequence_id], with_drawn[neighbour.sequence_id]
        assert one == other_told  # log probabilities too, bit for bit
    for submit in scored:
        told = with_given[submit.sequence_id]
        torch.testing.assert_close(chosen(told), bed.expected(submit), atol=1e-4, rtol=0)
        assert with_drawn[submit.sequence_id].tokens != told.tokens


def test_evicted_sequences_go_on_with_what_is_left(bed: Bed) -> None:
    submits = {i: given(i, (None, *NAMES)[i % 3], 30, 120) for i in range(6)}
    engine = bed.engine(pages=45)
    tokens: dict[int, list[int]] = {i: [] for i in submits}
    values: dict[int, list[float]] = {i: [] for i in submits}
    evictions, left = 0, dict(submits)
    while left:
        told = engine.run(*left.values())
        for i in left:
            tokens[i] += told[i].tokens
            values[i] += chosen(told[i]).tolist()
        evicted = [i for i in left if told[i].outcome is Departure.EVICTED]
        evictions += len(evicted)
        left = {i: replace(submits[i], generated=tuple(tokens[i])) for i in evicted}
    assert evictions > 1
    for i, submit in submits.items():
        assert tuple(tokens[i]) == submit.forced
        found = torch.tensor(values[i])
        torch.testing.assert_close(found, bed.expected(submit), atol=1e-4, rtol=0)
    engine.assert_empty()
    engine.close()


def test_beyond_the_given_tokens_the_model_draws(bed: Bed, engine: TinyEngine) -> None:
    submit = replace(given(1, "one", answer=6), max_tokens=12)
    told = engine.run(submit)[1]
    assert tuple(told.tokens[:6]) == submit.forced
    tokens = [*submit.prompt, *told.tokens]
    drawn = reference_logits(bed.reference, "one", tokens)[len(submit.prompt) + 5 : -1]
    assert told.tokens[6:] == drawn.argmax(-1).tolist()
