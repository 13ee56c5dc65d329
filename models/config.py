"""The base model's dimensions and its family's peculiarities, as data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from granatum.v1.errors import InvalidRequest

GROUPS = ("qkv", "o", "gate_up", "down")
"""The linears of a layer, each the fusion of the projections that read the same input."""


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes a family: which linears may have a bias, and whether q and k are normed.

    `biased` groups always have one; `optional` ones do if the config sets `attention_bias`.
    """

    biased: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(optional=("qkv", "o")),
    "mistral": Family(),
    "qwen2": Family(biased=("qkv",)),
    "qwen3": Family(optional=("qkv", "o"), qk_norm=True),
}
"""By `model_type`."""

_NEUTRAL = {"hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1}
_ROPES = ("default", "linear", "llama3")
_ROPE_NEUTRAL = {"partial_rotary_factor": 1.0}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: frequencies theta^(-2i/d), scaled as Llama 3 or linear scaling do."""

    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    """With the two below: Llama 3's scaling; without: every frequency is divided by `factor`."""
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians per position of each of the head_dim / 2 pairs."""
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        return [self._scaled(frequency) for frequency in plain]

    def _scaled(self, frequency: float) -> float:
        if self.low_freq_factor is None:
            return frequency / self.factor
        turns = self.original_positions * frequency / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = min(max((turns - self.low_freq_factor) / span, 0.0), 1.0)
        return keep * frequency + (1 - keep) * frequency / self.factor


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder's dimensions."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    """Whether the output projection is the embedding."""
    qk_norm: bool = False
    biased: frozenset[str] = frozenset()
    """The groups with a bias."""

    @property
    def q_size(self) -> int:
        """Elements of a row's queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of a row's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Elements of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_size

    @property
    def out_features(self) -> dict[str, tuple[int, ...]]:
        """Of each group, the width of each of its projections."""
        return {
            "qkv": (self.q_size, self.kv_size, self.kv_size),
            "o": (self.hidden,),
            "gate_up": (self.intermediate, self.intermediate),
            "down": (self.hidden,),
        }

    @property
    def in_features(self) -> dict[str, int]:
        """The width of each group's input."""
        return {
            "qkv": self.hidden,
            "o": self.q_size,
            "gate_up": self.hidden,
            "down": self.intermediate,
        }


def read_config(directory: Path) -> ModelConfig:
    """The config of a Hugging Face model directory.

    Raises:
        InvalidRequest: naming what this runner does not support.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(directory))
    return from_hugging_face(config)


def from_hugging_face(config: Any) -> ModelConfig:
    """The same, of a `transformers` config object."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        _refuse("model_type", config.model_type, f"one of {', '.join(FAMILIES)}")
    for name, neutral in _NEUTRAL.items():
        if getattr(config, name, neutral) not in (neutral, None):
            _refuse(name, getattr(config, name), repr(neutral))
    _refuse_sliding_window(config)
    optional = family.optional if getattr(config, "attention_bias", False) else ()
    heads = config.num_attention_heads
    return ModelConfig(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
        rms_eps=config.rms_norm_eps,
        rope=_rope(dict(config.rope_parameters or {}), config.max_position_embeddings),
        tied=bool(config.tie_word_embeddings),
        qk_norm=family.qk_norm,
        biased=frozenset((*family.biased, *optional)),
    )


def _rope(parameters: dict[str, Any], max_positions: int) -> Rope:
    for name, neutral in _ROPE_NEUTRAL.items():
        if parameters.get(name, neutral) not in (neutral, None):
            _refuse(f"rope_parameters.{name}", parameters[name], repr(neutral))
    theta = float(parameters.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPES:
        _refuse("rope_parameters.rope_type", kind, f"one of {', '.join(_ROPES)}")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, float(parameters["factor"]))
    return Rope(
        theta,
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        int(parameters.get("original_max_position_embeddings") or max_positions),
    )


def _refuse_sliding_window(config: Any) -> None:
    """A window as long as the context changes nothing; a shorter one is not supported."""
    layers = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in layers if layers else config.model_type == "mistral"
    window = getattr(config, "sliding_window", None)
    if windowed and window is not None and window < config.max_position_embeddings:
        _refuse("sliding_window", window, f"null or at least {config.max_position_embeddings}")


def _refuse(field: str, value: object, supported: str) -> NoReturn:
    raise InvalidRequest(
        f"config.json: {field} = {value!r} is not supported by this runner: it must be {supported}"
    )
