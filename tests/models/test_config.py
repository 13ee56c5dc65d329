"""Configs against transformers' own rotary frequencies, and what is refused by name."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from granatum.models.config import from_hugging_face
from granatum.v1.errors import InvalidRequest

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
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies(rope: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    expected = LlamaRotaryEmbedding(config).inv_freq
    ours = torch.tensor(from_hugging_face(config).rope.frequencies(head_dim))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-9)


def test_ropes_as_transformers_4_wrote_them() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = LlamaConfig.from_dict({"rope_theta": 777.0, "rope_scaling": scaling})
    rope = from_hugging_face(config).rope
    assert (rope.theta, rope.factor) == (777.0, 2.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    config = from_hugging_face(FAMILIES[family][1])
    assert config.qk_norm == (family == "qwen3")
    assert config.biased == {
        "llama_linear_rope_bias": {"qkv", "o"},
        "qwen2": {"qkv"},
    }.get(family, set())
    assert config.tied == (family in ("llama_gqa_tied", "qwen3"))
    assert config.head_dim == {"llama_head_dim": 24, "qwen3": 32}.get(family, 16)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (GemmaConfig(), "model_type = 'gemma'"),
        (LlamaConfig(mlp_bias=True), "mlp_bias = True"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), "sliding_window"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2),
            "sliding_window = 4096",
        ),
        (
            Qwen3Config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type = 'dynamic'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: PreTrainedConfig, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        from_hugging_face(config)


def test_a_window_as_long_as_the_context_changes_nothing() -> None:
    from_hugging_face(MistralConfig(sliding_window=4096, max_position_embeddings=4096))
    from_hugging_face(Qwen2Config(use_sliding_window=False))
