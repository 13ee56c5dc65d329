"""Models that are exact up to a bound, and rotary scalings, against transformers in float32."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from peft import LoraConfig
from tiny_models import (
    SIZES,
    VOCAB,
    TinyEngine,
    make_adapters,
    make_model_of,
    reference_logits,
)
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from granatum.runner.engine.engine import Engine
from granatum.runner.engine.process import EngineOptions, build_engine
from granatum.runner.model.adapter_loader import MemoryImages
from granatum.runner.records import Finish, Submit
from granatum.v1.errors import InvalidRequest

BOUND = 80
SHORT = {**SIZES, "max_position_embeddings": BOUND}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 64.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
MODELS: dict[str, tuple[Any, Any]] = {
    "mistral with a window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=BOUND)),
    "phi3 with a window": (
        Phi3ForCausalLM,
        Phi3Config(**SIZES, sliding_window=BOUND, pad_token_id=None),
    ),
    "qwen3 with windows": (
        Qwen3ForCausalLM,
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=BOUND, max_window_layers=1),
    ),
    "phi3 longrope": (
        Phi3ForCausalLM,
        Phi3Config(
            **SIZES,
            pad_token_id=None,
            original_max_position_embeddings=BOUND,
            rope_parameters=LONG,
        ),
    ),
    "llama longrope": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters={**LONG, "original_max_position_embeddings": BOUND}),
    ),
    "llama dynamic": (LlamaForCausalLM, LlamaConfig(**SHORT, rope_parameters=DYNAMIC)),
    "qwen2 dynamic": (Qwen2ForCausalLM, Qwen2Config(**SHORT, rope_parameters=DYNAMIC)),
}
"""Each is exact for `BOUND` tokens, and changes what it computes beyond."""
YARNS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHORT, rope_parameters=YARN)),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**SHORT, sliding_window=None, rope_parameters={**YARN, "truncate": False}),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHORT, rope_parameters=YARN)),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**SHORT, head_dim=32, rope_parameters={**YARN, "attention_factor": 0.8}),
    ),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig(**SHORT, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    ),
}
"""Each reaches over 4 * 24 tokens."""


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())


@pytest.fixture
def engines() -> Iterator[list[TinyEngine]]:
    running: list[TinyEngine] = []
    yield running
    for engine in running:
        engine.close()


def assert_exact(
    place: Path, kind: Any, config: Any, context: int, engines: list[TinyEngine]
) -> None:
    """Short and long prompts to the very end of the context, with and without an adapter."""
    model = make_model_of(place / "base", kind, config)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    reference = make_adapters(model, {"tuned": lora}, place)
    engine = TinyEngine(place / "base", place, ["tuned"], max_rank=8)
    engines.append(engine)
    submits = [
        Submit(index, prompt_of(index, length), adapter=adapter, max_tokens=1000, top_logprobs=3)
        for index, (length, adapter) in enumerate(
            [(4, None), (4, "tuned"), (context - 1, None), (context - 9, "tuned")]
        )
    ]
    heard = engine.run(*submits)
    for submit in submits:
        told = heard[submit.sequence_id]
        assert told.outcome is Finish.LENGTH
        tokens = [*submit.prompt, *told.tokens]
        assert len(tokens) == context
        expected = reference_logits(reference, submit.adapter, tokens)[len(submit.prompt) - 1 : -1]
        assert told.tokens == expected.argmax(-1).tolist()
        for row, entry in zip(torch.log_softmax(expected, -1), told.logprobs, strict=True):
            for token, value in entry.top:
                assert abs(value - float(row[token])) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exact_up_to_its_bound(
    name: str, tmp_path: Path, engines: list[TinyEngine]
) -> None:
    assert_exact(tmp_path, *MODELS[name], BOUND, engines)


@pytest.mark.parametrize("family", YARNS)
def test_yarn_is_exact_as_far_as_its_factor_reaches(
    family: str, tmp_path: Path, engines: list[TinyEngine]
) -> None:
    assert_exact(tmp_path, *YARNS[family], 4 * 24, engines)


@pytest.mark.parametrize("name", MODELS)
def test_one_token_more_would_be_another_model(name: str, tmp_path: Path) -> None:
    """So the bound is no lower than it must be; the first tokens' logits tell."""
    kind, config = MODELS[name][0], deepcopy(MODELS[name][1])
    model = make_model_of(tmp_path, kind, config)
    tokens = list(prompt_of(0, BOUND + 8))
    within = reference_logits(model, None, tokens[:BOUND])
    beyond = reference_logits(model, None, tokens)
    if config.rope_parameters["rope_type"] == "default":  # a window hides the first tokens
        config.sliding_window = None
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        whole = kind(config).eval()
        whole.load_state_dict(model.state_dict())
        within, beyond = beyond[BOUND:], reference_logits(whole, None, tokens)[BOUND:]
    assert (within - beyond[: len(within)]).abs().max() > 1e-3


def built(folder: Path, max_context: int | None) -> Engine:
    options = EngineOptions(
        folder, "cpu", arena_bytes=1 << 20, host_cache_bytes=1 << 18, max_rank=8,
        max_context=max_context,
    )  # fmt: skip
    return build_engine(options, lambda _: MemoryImages({}))


def test_without_max_context_a_runner_serves_what_is_exact_and_says_so(tmp_path: Path) -> None:
    make_model_of(tmp_path, *MODELS["mistral with a window"])
    with structlog.testing.capture_logs() as logs:
        assert built(tmp_path, None).limits.max_context == BOUND
    (line,) = (entry for entry in logs if "positions" in entry)
    assert (line["max_context"], line["because"], line["positions"]) == (
        BOUND,
        "sliding_window",
        512,
    )
    with structlog.testing.capture_logs() as logs:
        assert built(tmp_path, BOUND).limits.max_context == BOUND
    assert not [entry for entry in logs if "positions" in entry]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mistral with a window", "sliding_window"),
        ("phi3 longrope", "original_max_position_embeddings"),
        ("qwen2 dynamic", "max_position_embeddings"),
    ],
)
def test_a_context_beyond_what_is_exact_is_refused(name: str, field: str, tmp_path: Path) -> None:
    MODELS[name][1].save_pretrained(tmp_path)
    said = f"--max-context 81 is not supported: {field} .* give --max-context 80 or less"
    with pytest.raises(InvalidRequest, match=said):
        built(tmp_path, BOUND + 1)
