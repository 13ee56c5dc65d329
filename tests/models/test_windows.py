"""Sliding windows: which layers of a config.json have one, and up to where they hide nothing."""

from typing import Any

import pytest
from transformers import MistralConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from granatum.models.config import ModelConfig, parse_config
from granatum.models.config_fields import Fields
from granatum.v1.errors import InvalidRequest

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "vocab_size": 64,
    "sliding_window": None,
}
SLIDING = ["sliding_attention"] * 2


def parsed(config: dict[str, Any] | PreTrainedConfig) -> ModelConfig:
    return parse_config(Fields(config if isinstance(config, dict) else config.to_dict(), ""))


@pytest.mark.parametrize(
    ("config", "window", "context"),
    [
        (MistralConfig(sliding_window=4096, max_position_embeddings=4096), 4096, 4096),
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), 4096, 4096),
        (MistralConfig(sliding_window=None, max_position_embeddings=32768), None, 32768),
        (Phi3Config(sliding_window=2047), 2047, 2047),
        (Phi3Config(sliding_window=4096), 4096, 4096),
        (Phi3Config(sliding_window=262144), 262144, 4096),
        (Phi3Config(sliding_window=None), None, 4096),
        (Qwen2Config(use_sliding_window=False, sliding_window=8), None, 32768),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=2), 8, 8),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=32), None, 32768),
        ({**QWEN, "sliding_window": 8, "use_sliding_window": True}, None, 32768),
        (Qwen3Config(layer_types=["full_attention"] * 32, use_sliding_window=True), None, 32768),
    ],
)
def test_a_model_is_served_up_to_the_window_of_its_layers(
    config: dict[str, Any] | PreTrainedConfig, window: int | None, context: int
) -> None:
    found = parsed(config)
    assert (found.window, found.context[0]) == (window, context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "for each of 2 layers"),
        ({"layer_types": ["full_attention"] * 3}, "for each of 2 layers"),
        ({"layer_types": "full_attention"}, "for each of 2 layers"),
        ({"layer_types": SLIDING}, "full_attention alone, as use_sliding_window is not true"),
    ],
)
def test_layer_types_that_transformers_cannot_serve_are_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"layer_types = .* {message}"):
        parsed({**QWEN, **changes})


def test_layers_with_a_window_need_its_size() -> None:
    with pytest.raises(InvalidRequest, match=r"sliding_window = null .* layer_types has sliding"):
        parsed({**QWEN, "layer_types": SLIDING, "use_sliding_window": True})
