"""The base model that adapters are made for: its shape, from config.json, and its identity."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granatum.models.identity import fingerprint
from granatum.v1.errors import InvalidRequest

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Projections that share an input, in the order of their indices 0..3."""
PROJECTIONS: tuple[str, ...] = tuple(name for group in GROUPS.values() for name in group)
"""In the order of their indices 0..6."""
PARENTS: dict[str, str] = {
    name: "self_attn" if group in ("qkv", "o") else "mlp"
    for group, names in GROUPS.items()
    for name in names
}
"""The module of a layer that holds the projection."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# What a family's configuration class assumes where config.json is silent.
_HEAD_DIM = {"qwen3": 128}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_ATTENTION_BIAS = {"qwen2": True}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's name and shape.

    `features` maps each projection to (in_features, out_features). `fingerprint` (64 hexadecimal
    digits) is equal for models of which one can continue the other's streams: shape, weights,
    tokenizer and end tokens are the same (`model_identity`).
    """

    name: str
    num_layers: int
    features: dict[str, tuple[int, int]]
    fingerprint: str

    @classmethod
    def from_config(cls, path: Path | str, name: str | None = None) -> "BaseModel":
        """Read a model directory, or that of a config.json. The name is the directory's if absent.

        The identity is that of all the model's files in the directory: routers and runners need
        the same ones, not config.json alone. Raises InvalidRequest if there is no config.json, or
        the model is of no supported family.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        config = _read(file)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise InvalidRequest(
                f"{file}: model_type {family!r} cannot be served; supported: {', '.join(FAMILIES)}"
            )
        shape = _shape(config, file)
        return cls(
            name=name or file.parent.resolve().name,
            num_layers=shape["num_hidden_layers"],
            features=_features(shape),
            fingerprint=fingerprint(shape, config, file.parent),
        )

    def module_name(self, layer: int, projection: str) -> str:
        """The module's name in transformers, such as `model.layers.0.self_attn.q_proj`."""
        return f"model.layers.{layer}.{PARENTS[projection]}.{projection}"


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{file} cannot be read as a model's config.json ({error}): "
            "point to a Hugging Face model directory"
        ) from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{file} is not a JSON object")
    return config


def _shape(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Every field that decides what the model computes, with absent ones filled in."""
    family = config["model_type"]
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return {
            "model_type": family,
            "hidden_size": hidden,
            "intermediate_size": int(config["intermediate_size"]),
            "num_hidden_layers": int(config["num_hidden_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(
                config.get("num_key_value_heads") or _KV_HEADS.get(family, heads)
            ),
            "head_dim": int(config.get("head_dim") or _HEAD_DIM.get(family, hidden // heads)),
            "vocab_size": int(config["vocab_size"]),
            "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "hidden_act": config.get("hidden_act", "silu"),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "attention_bias": bool(
                config.get("attention_bias", _ATTENTION_BIAS.get(family, False))
            ),
            "mlp_bias": bool(config.get("mlp_bias", False)),
            "sliding_window": _sliding_window(config),
            "rope": _rope(config),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidRequest(f"{file}: the field {error} is missing or no number") from error


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    # Qwen states a window that it does not use unless told to; Mistral has no such switch.
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    return config.get("sliding_window") if used else None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, the same whether transformers 4 or 5 wrote them."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {key: _number(value) for key, value in settings.items() if value is not None}
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", _number(config.get("rope_theta") or 10_000.0))
    return rope


def _number(value: object) -> object:
    """A number as a float: 8 and 8.0 are one setting."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _features(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q = shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    return {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
