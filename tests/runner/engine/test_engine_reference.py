"""The engine against transformers and PEFT in float32: every family, every kind of adapter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import (
    FAMILIES,
    VOCAB,
    TinyEngine,
    Told,
    make_adapters,
    make_model,
    reference_logits,
)

from granatum.models.families import FAMILIES as ROWS
from granatum.runner.records import Departure, Finish, Sampling, Submit

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "r1": LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
    "r4": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "r8rs": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=ALL),
    "r16": LoraConfig(r=16, lora_alpha=16, target_modules=["k_proj", "gate_proj", "down_proj"]),
    "r40": LoraConfig(r=40, lora_alpha=20, target_modules=ALL),
    "r64": LoraConfig(r=64, lora_alpha=32, target_modules=["o_proj", "up_proj"]),
    "r256": LoraConfig(r=256, lora_alpha=64, target_modules=ALL),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=ALL,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 24},
        alpha_pattern={"down_proj": 3, "layers.0.self_attn.o_proj": 32},
    ),
    "one_layer": LoraConfig(r=12, lora_alpha=12, target_modules=ALL, layers_to_transform=[1]),
}
SMALL = ("r1", "r4", "r8rs")


FUSED_ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FUSED_ADAPTERS = {
    "r1": LoraConfig(r=1, lora_alpha=2, target_modules=["qkv_proj"]),
    "r4": LoraConfig(r=4, lora_alpha=8, target_modules=FUSED_ALL),
    "r8rs": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear"),
    "r16": LoraConfig(r=16, lora_alpha=16, target_modules=["gate_up_proj", "down_proj"]),
    "r40": LoraConfig(r=40, lora_alpha=20, target_modules=FUSED_ALL),
    "r64": LoraConfig(r=64, lora_alpha=32, target_modules=r".*\.(o|gate_up)_proj"),
    "r256": LoraConfig(r=256, lora_alpha=64, target_modules=FUSED_ALL),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=FUSED_ALL,
        rank_pattern={"qkv_proj": 2, "layers.1.mlp.gate_up_proj": 24},
        alpha_pattern={"down_proj": 3, "layers.0.self_attn.qkv_proj": 32},
    ),
    "one_layer": LoraConfig(r=12, lora_alpha=12, target_modules=FUSED_ALL, layers_to_transform=[1]),
}
"""For families whose checkpoints fuse projections: a fused linear has one A and one B."""


class Bed:
    """A base model with all adapters, in PEFT and saved for the engine."""

    def __init__(self, directory: Path, family: str) -> None:
        self.base, self.adapters = directory / "base", directory / "adapters"
        model = make_model(self.base, family)
        fused = "qkv_proj" in dict(model.model.layers[0].self_attn.named_children())
        configs = FUSED_ADAPTERS if fused else ADAPTERS
        self.reference = make_adapters(model, configs, self.adapters)

    def engine(self, max_rank: int = 256, **changes: int) -> TinyEngine:
        """With the adapters of up to `max_rank`, on which the size of a page depends."""
        names = SMALL if max_rank == 8 else ADAPTERS
        return TinyEngine(self.base, self.adapters, names, (), max_rank=max_rank, **changes)

    def assert_right(self, submit: Submit, told: Told) -> None:
        """Every token was the likeliest, and its log probabilities are PEFT's within 1e-3."""
        tokens = [*submit.prompt, *submit.generated, *told.tokens]
        start = len(submit.prompt) + len(submit.generated) - 1
        logits = reference_logits(self.reference, submit.adapter, tokens)[start:-1]
        assert told.tokens == logits.argmax(-1).tolist()
        expected = torch.log_softmax(logits, -1)
        for position, entry in enumerate(told.logprobs):
            row = expected[position]
            assert abs(entry.chosen - float(row[told.tokens[position]])) < 1e-3
            for token, value in entry.top:
                assert abs(value - float(row[token])) < 1e-3
            values, _ = row.topk(len(entry.top))
            assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("gqa"), "llama3_rope")


@pytest.fixture
def started(bed: Bed) -> Iterator[Any]:
    """Starts engines on the bed, and ends them."""
    engines: list[TinyEngine] = []

    def start(**changes: int) -> TinyEngine:
        engines.append(bed.engine(**changes))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())


def crowd(tokens: int = 12, **changes: Any) -> list[Submit]:
    """Sequences of every adapter and of the base model, with prompts of all lengths."""
    users = [None, *ADAPTERS, None, "r4", "r256", "r1"]
    return [
        Submit(i, prompt_of(i, 1 + 7 * i), adapter=user, max_tokens=tokens, **changes)
        for i, user in enumerate(users)
    ]


def test_every_family_and_option_is_among_the_references() -> None:
    configs = [config for _, config in FAMILIES.values()]
    for name, row in ROWS.items():
        own = [config for config in configs if config.model_type == name]
        assert own, name
        if row.optional_bias:
            assert any(config.attention_bias for config in own), name
        if row.optional_mlp_bias:
            assert any(config.mlp_bias for config in own), name
        for multiplier in row.multipliers:
            assert any(getattr(config, multiplier) != 1.0 for config in own), multiplier
    kinds = {config.rope_parameters["rope_type"] for config in configs}
    assert kinds >= {"default", "linear", "llama3"}
    assert {config.tie_word_embeddings for config in configs} == {True, False}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_mixed_batch_of_every_adapter(family: str, tmp_path: Path) -> None:
    bed = Bed(tmp_path, family)
    engine = bed.engine()
    submits = crowd(top_logprobs=20)
    told = engine.run(*submits)
    for submit in submits:
        bed.assert_right(submit, told[submit.sequence_id])
        assert told[submit.sequence_id].outcome is Finish.LENGTH
    figures = engine.engine.figures
    assert figures.decode_adapters > 8 * figures.decode_steps / 2
    engine.assert_empty()
    engine.close()


@pytest.mark.parametrize("adapter", [None, "r40"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(
    family: str, adapter: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = Bed(tmp_path, family)
    engine = bed.engine()
    seen: list[torch.Tensor] = []
    forward = engine.model.forward

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(forward(*arguments).clone())
        return seen[-1]

    monkeypatch.setattr(engine.model, "forward", watched)
    prompt = prompt_of(1, 20)
    tokens = engine.run(Submit(1, prompt, adapter=adapter, max_tokens=10))[1].tokens
    expected = reference_logits(bed.reference, adapter, [*prompt, *tokens])[19:-1]
    torch.testing.assert_close(torch.cat(seen), expected, atol=1e-3, rtol=0)
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_in_a_crowd(family: str, tmp_path: Path) -> None:
    bed, submits = Bed(tmp_path, family), crowd()
    crowded, quiet = bed.engine(), bed.engine()
    together = crowded.run(*submits)
    for submit in submits:
        alone = quiet.run(submit)
        assert alone[submit.sequence_id].tokens == together[submit.sequence_id].tokens
    crowded.close()
    quiet.close()


@pytest.mark.parametrize("budget", [16, 23])
def test_small_chunks(budget: int, bed: Bed, started: Any) -> None:
    submits = crowd(4, top_logprobs=2)
    told = started(prefill_tokens=budget).run(*submits)
    for submit in submits:
        bed.assert_right(submit, told[submit.sequence_id])


def test_long_generations_over_many_pages(bed: Bed, started: Any) -> None:
    engine = started(max_rank=8, pages=200)
    assert engine.engine.limits.page_tokens == 16
    submits = [
        Submit(1, prompt_of(1, 5), adapter="r8rs", max_tokens=300),
        Submit(2, prompt_of(2, 400), max_tokens=10_000),
        Submit(3, prompt_of(3, 16), adapter="r4", max_tokens=16),
    ]
    told = engine.run(*submits)
    assert len(told[2].tokens) == 512 - 400
    for submit in submits:
        bed.assert_right(submit, told[submit.sequence_id])


def test_evicted_sequences_go_on_as_if_nothing_had_happened(started: Any) -> None:
    submits = {
        i: Submit(i, prompt_of(i, 30), adapter=adapter, max_tokens=150)
        for i, adapter in enumerate(["r1", "r4", None, "r8rs", "r4", None])
    }
    whole = started(max_rank=8, pages=400).run(*submits.values())
    engine = started(max_rank=8, pages=55)
    made: dict[int, tuple[int, ...]] = dict.fromkeys(submits, ())
    evictions, left = 0, dict(submits)
    while left:
        told = engine.run(*left.values())
        made = {i: made[i] + tuple(told[i].tokens if i in left else ()) for i in made}
        evicted = [i for i in left if told[i].outcome is Departure.EVICTED]
        evictions += len(evicted)
        left = {i: replace(submits[i], generated=made[i]) for i in evicted}
    assert evictions > 1
    assert made == {i: tuple(told.tokens) for i, told in whole.items()}
    engine.assert_empty()


def test_a_sampled_sequence_resumes_anywhere(started: Any) -> None:
    sampling = Sampling(
        temperature=1.3, top_p=0.95, top_k=60, seed=5, repetition_penalty=1.2, presence_penalty=0.5
    )
    prompt = prompt_of(3, 12)
    submit = Submit(0, prompt, adapter="r8rs", sampling=sampling, max_tokens=24)
    whole = started().run(submit)[0].tokens
    again = [
        Submit(n, prompt, tuple(whole[:n]), "r8rs", sampling, max_tokens=24)
        for n in (1, 2, 9, 17, 23)
    ]
    for n, told in started().run(*again).items():
        assert told.tokens == whole[n:]
