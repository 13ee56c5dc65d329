"""The base model's dimensions and peculiarities, read from config.json without transformers."""

import json
from dataclasses import dataclass
from pathlib import Path

from granatum.models.config_fields import Fields
from granatum.models.families import FAMILIES, LLAMA, Family
from granatum.models.folder import config_file
from granatum.models.rope import PLAIN, Rope, read_rope
from granatum.v1.errors import InvalidRequest

MOST_LAYERS = 1024
SILU = "silu"


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
    """The positions that config.json or the rotary scaling speaks of."""
    rms_eps: float = 1e-6
    rope: Rope = PLAIN
    tied: bool = False
    """Whether the output projection is the embedding."""
    activation: str = SILU
    """What `hidden_act` says: the activation of the gate."""
    qk_norm: bool = False
    biased: frozenset[str] = frozenset()
    """The groups with a bias."""
    window: int | None = None
    """How many tokens a token attends to in some layer; None: all in every layer."""
    embedding_multiplier: float = 1.0
    """Multiplies what the embedding gives."""
    residual_multiplier: float = 1.0
    """Multiplies what attention and MLP add to the residual."""
    attention_multiplier: float | None = None
    """Multiplies the products of q and k; None: 1 / √head_dim."""
    logits_scaling: float = 1.0
    """Divides the logits."""
    family: Family = LLAMA

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
    def context(self) -> tuple[int, str]:
        """The most tokens of a sequence, and the field of config.json that says so.

        Up to there the model is computed exactly. A window of a longer sequence would hide tokens,
        and some rotary scalings would change.
        """
        bounds = [(self.max_positions, "max_position_embeddings")]
        if self.window is not None:
            bounds.append((self.window, "sliding_window"))
        if (exact := self.rope.scaling.exact_positions) is not None:
            bounds.append((exact, "original_max_position_embeddings"))
        return min(bounds)

    @property
    def attention_scale(self) -> float:
        """What multiplies the products of q and k."""
        multiplier = self.attention_multiplier
        return self.head_dim**-0.5 if multiplier is None else multiplier

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

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """Of each projection, (in_features, out_features)."""
        inputs, outputs = self.in_features, self.out_features
        return {
            projection: (inputs[group.name], width)
            for group in self.family.groups
            for projection, width in zip(group.projections, outputs[group.name], strict=True)
        }


def read_config(model: Path) -> ModelConfig:
    """The config of a Hugging Face model directory, or of a config.json.

    Raises InvalidRequest: which field cannot be served, and what it must be.
    """
    return parse_config(Fields.read(config_file(model)))


def parse_config(fields: Fields) -> ModelConfig:
    """The config that config.json's fields describe. Raises as `read_config`."""
    family = FAMILIES.get(str(fields.values.get("model_type")))
    if family is None:
        fields.refuse("model_type", f"one of {', '.join(FAMILIES)}")
    _refuse_quantised(fields)
    fields.require("hidden_act", SILU)
    heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    positions = fields.whole("max_position_embeddings", family.max_positions)
    head_dim = _head_dim(fields, family, hidden, heads)
    rope = read_rope(fields, family, head_dim, positions)
    return ModelConfig(
        vocab=fields.whole("vocab_size"),
        hidden=hidden,
        intermediate=fields.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(fields, family, heads),
        head_dim=head_dim,
        max_positions=max(positions, rope.scaling.positions),
        rms_eps=fields.number("rms_norm_eps", family.rms_eps),
        rope=rope,
        tied=fields.flag("tie_word_embeddings"),
        activation=str(fields.values.get("hidden_act") or SILU),
        qk_norm=family.qk_norm,
        biased=_biased(fields, family),
        window=_window(fields, family, layers),
        family=family,
        **{name: fields.number(name, 1.0) for name in family.multipliers},
    )


def _refuse_quantised(fields: Fields) -> None:
    """Weights are served as they are multiplied: in 16 or 32 bits."""
    for name in ("quantization_config", "quantization"):  # MLX writes the second
        if stored := fields.inner(name).values:
            raise InvalidRequest(
                f"{fields.place}{name} says that the weights are quantised (quant_method = "
                f"{json.dumps(stored.get('quant_method'))}): give the model in bfloat16, float16 "
                "or float32, from which this one was made"
            )


def _kv_heads(fields: Fields, family: Family, heads: int) -> int:
    found = fields.whole_or_none("num_key_value_heads", family.kv_heads) or heads
    if heads % found:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    return found


def _head_dim(fields: Fields, family: Family, hidden: int, heads: int) -> int:
    found = fields.whole_or_none("head_dim", family.head_dim) or hidden // heads
    if found % 2 or not found:
        fields.refuse("head_dim", "even and positive, as the halves of a head are rotated")
    return found


def _biased(fields: Fields, family: Family) -> frozenset[str]:
    """The groups with a bias."""
    if not family.optional_mlp_bias:
        fields.require("mlp_bias", False)
    found = set(family.biased)
    if fields.flag("attention_bias"):
        found.update(family.optional_bias)
    if fields.flag("mlp_bias"):
        found.update(family.optional_mlp_bias)
    return frozenset(found)


def _window(fields: Fields, family: Family, layers: int) -> int | None:
    """The window of the layers that have one."""
    if not _is_windowed(fields, family, layers):
        return None
    return fields.whole_or_none("sliding_window", family.window)


def _is_windowed(fields: Fields, family: Family, layers: int) -> bool:
    """Whether a layer attends to `sliding_window` tokens alone."""
    if family.windows != "if used":
        return family.windows == "always"
    if not fields.flag("use_sliding_window"):
        return False
    kinds = fields.values.get("layer_types")
    if isinstance(kinds, list):
        return "sliding_attention" in kinds
    first = fields.values.get("max_window_layers", family.max_window_layers)
    return not isinstance(first, int) or first < layers
