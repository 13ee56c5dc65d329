"""What adapters know of a base model; its fingerprint, under which everything is stored."""

import json
from pathlib import Path
from typing import Any

import pytest

from granatum.models.base_model import BaseModel

DIMENSIONS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("dd42ca5b18eb57b3", {"model_type": "llama"}),
    "llama of transformers 4": (
        "0b6826298f94af21",
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
    ),
    "llama of transformers 5": (
        "f395fc70fbe31074",
        {
            "model_type": "llama",
            "head_dim": 24,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4},
        },
    ),
    "mistral": (
        "f089bb425824216b",
        {
            "model_type": "mistral",
            "sliding_window": None,
            "rope_theta": 1e6,
            "num_key_value_heads": 4,
        },
    ),
    "mistral with a window": (
        "24c37a98cc855e5c",
        {
            "model_type": "mistral",
            "sliding_window": 4096,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
        },
    ),
    "qwen2": (
        "be65b2050ffc2074",
        {
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
        },
    ),
    "qwen3": (
        "22c52b307a1b4658",
        {
            "model_type": "qwen3",
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
    ),
    "qwen3 without head_dim": (
        "ce81f1c23deefc42",
        {"model_type": "qwen3", "num_key_value_heads": 2},
    ),
}
"""The first part of the fingerprint, as the first release with these families wrote it."""
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}


def base_of(folder: Path, config: dict[str, Any]) -> BaseModel:
    (folder / "config.json").write_text(json.dumps({**DIMENSIONS, **config}))
    return BaseModel.from_config(folder)


@pytest.mark.parametrize("case", SHAPES)
def test_the_shape_of_a_stored_model_never_changes(case: str, tmp_path: Path) -> None:
    digits, config = SHAPES[case]
    assert base_of(tmp_path, config).fingerprint[:16] == digits


@pytest.mark.parametrize("field", [name for name in GRANITE if name != "model_type"])
def test_every_multiplier_counts(field: str, tmp_path: Path) -> None:
    changed = base_of(tmp_path, {**GRANITE, field: 2.5}).fingerprint
    assert changed != base_of(tmp_path, GRANITE).fingerprint


def test_a_fused_module_is_as_wide_as_its_projections(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"model_type": "phi3", "num_key_value_heads": 2})
    assert {name: base.module_features(name) for name in base.modules} == {
        "qkv_proj": (64, 64 + 32 + 32),
        "o_proj": (64, 64),
        "gate_up_proj": (64, 96 + 96),
        "down_proj": (96, 64),
    }
    assert base.module_name(1, "gate_up_proj") == "model.layers.1.mlp.gate_up_proj"
    assert base.module_of("v_proj").name == "qkv_proj"
