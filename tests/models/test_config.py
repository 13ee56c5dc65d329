"""config.json as transformers reads it, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, FAMILIES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from granatum.models.config import ModelConfig, read_config
from granatum.models.families import FAMILIES as ROWS
from granatum.models.rope import Rope
from granatum.runner.model.weights import empty_weights, targets
from granatum.v1.errors import InvalidRequest

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    YARN,
    {**YARN, "attention_factor": 0.7, "beta_fast": 20.0, "beta_slow": 0.5, "truncate": False},
    {**YARN, "beta_fast": None, "beta_slow": 0, "mscale": 1.5, "mscale_all_dim": 0.5},
    {**YARN, "mscale": 1.5, "rope_theta": 500.0, "factor": 0.5},
    {**YARN, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    {**YARN, "beta_fast": 1.0, "beta_slow": 32.0},
    {**YARN, "factor": None, "mscale_all_dim": 0},
    {"rope_type": "dynamic", "rope_theta": 1e5, "factor": 4.0},
]
REQUIRED: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "vocab_size": 64,
}
STATED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # 4096 if absent, which is refused
    "phi3": {"pad_token_id": None},  # beyond so small a vocabulary if absent
}
MISTRAL = {"model_type": "mistral", **REQUIRED, "sliding_window": None}


def written(folder: Path, config: dict[str, Any] | PreTrainedConfig) -> Path:
    """A folder with the config.json."""
    fields = config if isinstance(config, dict) else config.to_dict()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def longrope(head_dim: int, **changes: Any) -> dict[str, Any]:
    short = [1 + pair / 10 for pair in range(head_dim // 2)]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    return {**rope, "short_factor": short, "long_factor": [9 * f for f in short], **changes}


def assert_same_rope(ours: Rope, config: PreTrainedConfig, head_dim: int) -> None:
    """Frequencies and amplitude are those that transformers starts with."""
    expected = LlamaRotaryEmbedding(config)
    frequencies = torch.tensor(ours.frequencies(head_dim))
    torch.testing.assert_close(frequencies, expected.inv_freq, rtol=1e-5, atol=1e-9)
    assert ours.scaling.amplitude == pytest.approx(expected.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ropes_are_those_of_transformers(
    rope: dict[str, Any], head_dim: int, tmp_path: Path
) -> None:
    config = LlamaConfig(
        head_dim=head_dim, rope_parameters=dict(rope), max_position_embeddings=131072
    )
    ours = read_config(written(tmp_path, config)).rope
    assert_same_rope(ours, config, head_dim)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 32.0},
        {"factor": 0.5},
        {"attention_factor": 1.3},
        {"original_max_position_embeddings": 2048},
    ],
)
def test_longrope_is_that_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    rope = longrope(64, **changes)
    config = LlamaConfig(head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    ours = read_config(written(tmp_path, config))
    assert_same_rope(ours.rope, config, 64)
    bound = rope["original_max_position_embeddings"]
    assert ours.context == (bound, "original_max_position_embeddings")


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi3_calls_longrope_by_older_names_too(name: str, tmp_path: Path) -> None:
    """The original positions stand beside the scaling, or are 4096."""
    scaling = longrope(8)
    published = {
        "model_type": "phi3",
        **REQUIRED,
        "pad_token_id": None,
        "rope_theta": 1e4,
        "max_position_embeddings": 131072,
        "sliding_window": 262144,
        "rope_scaling": {
            "type": name,
            "short_factor": scaling["short_factor"],
            "long_factor": scaling["long_factor"],
        },
    }
    for beside, original in ({"original_max_position_embeddings": 2048}, 2048), ({}, 4096):
        ours = read_config(written(tmp_path, {**published, **beside}))
        newer = {**published, "rope_scaling": {**published["rope_scaling"], "type": "longrope"}}
        written(tmp_path, {**newer, **beside})  # transformers 5 reads no `su` any more
        assert_same_rope(ours.rope, AutoConfig.from_pretrained(tmp_path), 8)
        assert ours.context == (original, "original_max_position_embeddings")


@pytest.mark.parametrize("rope", [*ROPES, longrope(8)])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_ropes_are_the_same_whichever_transformers_wrote_them(
    rope: dict[str, Any], spelling: str, tmp_path: Path
) -> None:
    newer = read_config(
        written(tmp_path, {"model_type": "llama", **REQUIRED, "rope_parameters": rope})
    )
    scaling = {name: value for name, value in rope.items() if not name.startswith("rope_")}
    older: dict[str, Any] = {
        "model_type": "llama",
        **REQUIRED,
        "rope_theta": int(rope["rope_theta"]),
        "rope_scaling": {**scaling, spelling: rope["rope_type"]} if scaling else None,
    }
    assert read_config(written(tmp_path, older)) == newer
    assert_same_rope(newer.rope, AutoConfig.from_pretrained(tmp_path), 8)
    assert read_config(written(tmp_path, {**older, "rope_scaling": newer.rope.settings})) == newer


def test_yarn_reaches_as_far_as_its_factor(tmp_path: Path) -> None:
    """Model cards add it to a config.json, and leave max_position_embeddings as it was."""
    published = {**REQUIRED, "model_type": "qwen3", "max_position_embeddings": 40960}
    assert read_config(written(tmp_path, published)).context[0] == 40960
    asked = read_config(written(tmp_path, {**published, "rope_scaling": YARN}))
    assert asked.context == (131072, "max_position_embeddings")


@pytest.mark.parametrize("family", ROWS)
def test_what_config_json_leaves_out_is_what_transformers_assumes(
    family: str, tmp_path: Path
) -> None:
    written(tmp_path, {"model_type": family, **REQUIRED, **STATED.get(family, {})})
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert_same_model(ours, theirs)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rope.settings["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours.rope.settings["rope_type"] == theirs.rope_parameters["rope_type"]
    assert theirs.hidden_act == "silu"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_config_json_says_is_what_transformers_makes_of_it(
    family: str, tmp_path: Path
) -> None:
    config = FAMILIES[family][1]
    assert_same_model(read_config(written(tmp_path, config)), config)


def assert_same_model(ours: ModelConfig, theirs: PreTrainedConfig) -> None:
    """Every tensor's name and shape, and every factor and epsilon, are those of transformers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if ours.tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del expected["lm_head.weight"]
    found = targets(ours, empty_weights(ours, torch.float32, CPU))
    assert {name: tuple(tensor.shape) for name, tensor in found} == expected
    attention = model.model.layers[0].self_attn
    assert ours.head_dim == attention.head_dim
    assert ours.attention_scale == attention.scaling
    assert ours.rms_eps == model.model.norm.variance_epsilon
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        assert getattr(ours, name) == getattr(theirs, name, 1.0)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


_ORIGINAL = "original_max_position_embeddings"


def test_original_positions_beside_the_scaling_count(tmp_path: Path) -> None:
    """As in transformers."""
    scaling = {**LLAMA3, "original_max_position_embeddings": None}
    config = {**MISTRAL, "rope_scaling": scaling, "original_max_position_embeddings": 16}
    settings = read_config(written(tmp_path, config)).rope.settings
    assert settings["original_max_position_embeddings"] == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmaConfig(), 'model_type = "gemma" is not supported: it must be one of llama'),
        ({**MISTRAL, "mlp_bias": True}, "mlp_bias = true .* must be false"),
        (
            {**MISTRAL, "quantization_config": {"quant_method": "awq", "bits": 4}},
            'quantization_config .* \\(quant_method = "awq"\\): give the model in bfloat16',
        ),
        ({**MISTRAL, "is_causal": False}, "is_causal = false .* must be true"),
        (
            {**MISTRAL, "per_layer_config": {"1": {"intermediate_size": 8}}},
            "per_layer_config = .* all layers",
        ),
        (LlamaConfig(hidden_act="gelu"), 'hidden_act = "gelu" .* must be "silu"'),
        (
            {**MISTRAL, "model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope_scaling.type = "linear" .* one of default, longrope',
        ),
        (
            {**MISTRAL, "rope_scaling": longrope(8, long_factor=[1.0] * 3)},
            "rope_scaling.long_factor = .* a list of 4 numbers",
        ),
        (
            {**MISTRAL, "rope_scaling": longrope(8, short_factor=[1.0, 1.0, 0, 1.0])},
            "rope_scaling.short_factor.2 = 0 .* positive",
        ),
        ({**MISTRAL, "rope_scaling": {**YARN, "factor": 1e300}}, "rope_scaling.factor = .* most"),
        (
            {**MISTRAL, "rope_scaling": {**YARN, "rope_theta": 1.0}},
            "rope_scaling.rope_theta = 1.0 .* above 1",
        ),
        (
            {**MISTRAL, "rope_scaling": {**YARN, "truncate": "no"}},
            "rope_scaling.truncate = .* true",
        ),
        (
            {**MISTRAL, "rope_scaling": {**YARN, "mscale": -1, "mscale_all_dim": 1}},
            "rope_scaling.mscale = -1",
        ),
        (Phi3Config(partial_rotary_factor=0.75), "partial_rotary_factor = 0.75 .* must be 1"),
        ({**MISTRAL, "model_type": None}, "model_type = null"),
        ({**MISTRAL, "vocab_size": None}, "vocab_size is missing"),
        ({**MISTRAL, "hidden_size": "256"}, 'hidden_size = "256" .* positive whole number'),
        ({**MISTRAL, "num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({**MISTRAL, "num_attention_heads": True}, "num_attention_heads = true"),
        ({**MISTRAL, "num_key_value_heads": 5}, "num_key_value_heads = 5 .* divisor of .* 32"),
        ({**MISTRAL, "head_dim": 7}, "head_dim = 7 .* even"),
        ({**MISTRAL, "rms_norm_eps": "small"}, 'rms_norm_eps = "small" .* a number'),
        ({**MISTRAL, "rms_norm_eps": 10**400}, "rms_norm_eps = 10* .* finite"),
        ({**MISTRAL, "rope_theta": -1}, "rope_theta = -1 .* positive"),
        ({**MISTRAL, "rope_scaling": [1]}, r"rope_scaling = \[1\] .* an object"),
        ({**MISTRAL, "rope_scaling": {"type": "su"}}, 'rope_scaling.type = "su"'),
        ({**MISTRAL, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor = null"),
        (
            {**MISTRAL, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters.full_attention = .* all layers",
        ),
        (
            {**MISTRAL, "rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor = 1.0 .* above low_freq_factor, which is 1.0",
        ),
        (
            {**MISTRAL, "rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
            "rope_scaling.original_max_position_embeddings = 64 .* 16, as beside the scaling$",
        ),
        (
            {**MISTRAL, "model_type": "phi3", "rope_scaling": longrope(8) | {_ORIGINAL: 64}},
            f"rope_scaling.{_ORIGINAL} = 64 .* where phi3 has 4096 unless config.json says",
        ),
        ({**MISTRAL, "vocab_size": 10**9}, "vocab_size = 10* .* at most 16,777,216"),
        ({**MISTRAL, "num_hidden_layers": 10**9}, "num_hidden_layers = 10* .* at most 1,024"),
        ({**MISTRAL, "tie_word_embeddings": "no"}, 'tie_word_embeddings = "no" .* true or false'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    config: dict[str, Any] | PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=f"config.json: {message}"):
        read_config(written(tmp_path, config))


def test_what_changes_only_the_order_of_sums_is_served(tmp_path: Path) -> None:
    """As Llama-2-13b was published."""
    config = {"model_type": "llama", **REQUIRED}
    plain = read_config(written(tmp_path, config))
    assert read_config(written(tmp_path, {**config, "pretraining_tp": 2})) == plain
