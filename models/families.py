"""The families of base models that can be served, one row each.

A family is data: no other file decides anything by a family's name. A row says what a family's
decoder layers are made of, and what the family's configuration class in transformers assumes where
config.json is silent.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Module:
    """A linear of a decoder layer, as checkpoints and adapters know it.

    `parent` is the submodule of the layer that holds it. The rows of its weight are those of
    `projections`, one after another; most linears are one projection of the same name.
    """

    parent: str
    name: str
    projections: tuple[str, ...]

    @property
    def path(self) -> str:
        """Its name within a layer, such as `self_attn.q_proj`."""
        return f"{self.parent}.{self.name}"


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that read the same input, so that one matrix product computes them all."""

    name: str
    modules: tuple[Module, ...]

    @property
    def projections(self) -> tuple[str, ...]:
        """In the order of their rows in the product."""
        return tuple(name for module in self.modules for name in module.projections)


def _group(name: str, parent: str, *projections: str, fused: str = "") -> Group:
    """`fused`: the one linear that the family makes of all the projections."""
    if fused:
        return Group(name, (Module(parent, fused, projections),))
    return Group(name, tuple(Module(parent, single, (single,)) for single in projections))


_O = _group("o", "self_attn", "o_proj")
_DOWN = _group("down", "mlp", "down_proj")
_SEPARATE = (
    _group("qkv", "self_attn", "q_proj", "k_proj", "v_proj"),
    _O,
    _group("gate_up", "mlp", "gate_proj", "up_proj"),
    _DOWN,
)
_FUSED = (
    _group("qkv", "self_attn", "q_proj", "k_proj", "v_proj", fused="qkv_proj"),
    _O,
    _group("gate_up", "mlp", "gate_proj", "up_proj", fused="gate_up_proj"),
    _DOWN,
)


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes a family. The defaults are those of a dense Llama."""

    model_type: str
    groups: tuple[Group, ...] = _SEPARATE
    """A layer's linears. The order gives groups and projections their indices."""
    biased: tuple[str, ...] = ()
    """The groups that always have a bias."""
    optional_bias: tuple[str, ...] = ()
    """The groups that have a bias if config.json sets `attention_bias`."""
    optional_mlp_bias: tuple[str, ...] = ()
    """The groups that have a bias if config.json sets `mlp_bias`."""
    qk_norm: bool = False
    """Whether each head of q and k is normed."""
    ropes: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    """The scalings of rotary frequencies that the family may have."""
    longropes: tuple[str, ...] = ()
    """What else means `longrope` in the family's config.json."""
    windows: Literal["never", "always", "if used"] = "never"
    """Whether `sliding_window` counts; `if used`: where config.json sets `use_sliding_window`."""
    multipliers: tuple[str, ...] = ()
    """The fields of config.json that scale what a layer computes; 1 where they are absent."""
    default_targets: tuple[str, ...] = ()
    """What PEFT adapts if an adapter's `target_modules` is null; empty: PEFT refuses."""
    kv_heads: int | None = None
    """None: as many as `num_attention_heads`."""
    head_dim: int | None = None
    """None: `hidden_size` / `num_attention_heads`."""
    max_positions: int = 2048
    original_positions: int | None = None
    """None: `max_position_embeddings`, or what the rotary scaling says."""
    rms_eps: float = 1e-6
    window: int | None = None
    max_window_layers: int = 0
    """The first layer with a window, where `windows` is `if used`."""

    @property
    def modules(self) -> tuple[Module, ...]:
        """A layer's linears, in the order of their projections."""
        return tuple(module for group in self.groups for module in group.modules)

    @property
    def projections(self) -> tuple[str, ...]:
        """A layer's projections, in the order of their indices."""
        return tuple(name for group in self.groups for name in group.projections)


LLAMA = Family(
    "llama",
    optional_bias=("qkv", "o"),
    optional_mlp_bias=("gate_up", "down"),
    default_targets=("q_proj", "v_proj"),
)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        Family(
            "mistral",
            windows="always",
            default_targets=("q_proj", "v_proj"),
            kv_heads=8,
            max_positions=131_072,
            window=4096,
        ),
        Family(
            "qwen2",
            biased=("qkv",),
            windows="if used",
            default_targets=("q_proj", "v_proj"),
            kv_heads=32,
            max_positions=32_768,
            window=4096,
            max_window_layers=28,
        ),
        Family(
            "qwen3",
            optional_bias=("qkv", "o"),
            qk_norm=True,
            windows="if used",
            default_targets=("q_proj", "v_proj"),
            kv_heads=32,
            head_dim=128,
            max_positions=32_768,
            window=4096,
            max_window_layers=28,
        ),
        Family(
            "phi3",
            groups=_FUSED,
            ropes=("default", "longrope"),
            longropes=("su", "yarn"),
            windows="always",
            max_positions=4096,
            original_positions=4096,
            rms_eps=1e-5,
        ),
        Family(
            "granite",
            optional_bias=("qkv", "o"),
            optional_mlp_bias=("gate_up", "down"),
            multipliers=(
                "embedding_multiplier",
                "residual_multiplier",
                "attention_multiplier",
                "logits_scaling",
            ),
        ),
    )
}
"""By `model_type`."""
