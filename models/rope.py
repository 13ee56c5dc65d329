"""Rotary position embeddings, as config.json describes them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from granatum.models.config_fields import MOST, Fields
from granatum.models.families import Family
from granatum.models.scalings import UNSCALED, Linear, Llama3, LongRope, Scaling, Yarn

_THETA = 10_000.0
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: frequencies theta^(-2i/d), as the scaling changes them."""

    theta: float = _THETA
    scaling: Scaling = UNSCALED

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians per position of each of the head_dim / 2 pairs."""
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        return self.scaling.scaled(plain, self.theta)

    @property
    def settings(self) -> dict[str, Any]:
        """These settings as `rope_parameters` of config.json."""
        kind = {"rope_type": self.scaling.kind, "rope_theta": self.theta}
        return kind | asdict(self.scaling)


PLAIN = Rope()


def read_rope(config: Fields, family: Family, head_dim: int, positions: int) -> Rope:
    """The rotary settings, whether transformers 4 or 5 wrote them.

    Version 4 has `rope_scaling`, and everything else beside it. Version 5 has `rope_parameters`.
    `positions`: what `max_position_embeddings` says. Raises InvalidRequest unless the family may
    have the scaling.
    """
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    rope = config.inner(name)
    for field, value in rope.values.items():
        if isinstance(value, dict):
            rope.refuse(field, "a setting of all layers")
    for fields in (config, rope):
        fields.require("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta", config.number("rope_theta", _THETA))
    kind = _kind(rope, family)
    if kind == Linear.kind and (factor := rope.number("factor")) != 1.0:
        return Rope(theta, Linear(factor))
    if kind in (Llama3.kind, Yarn.kind, LongRope.kind):
        original = _original(config, rope, family, positions)
        if kind == Llama3.kind:
            return Rope(theta, _llama3(rope, original))
        if kind == Yarn.kind:
            return Rope(theta, _yarn(rope, theta, positions, original))
        return Rope(theta, _longrope(rope, head_dim, positions, original))
    # `dynamic` changes the frequencies of sequences of more than `positions` tokens alone, and
    # no sequence has more.
    return Rope(theta)


def _kind(rope: Fields, family: Family) -> str:
    spelling = "rope_type" if rope.values.get("rope_type") else "type"
    kind = rope.values.get(spelling) or Scaling.kind
    if kind in family.longropes:
        return LongRope.kind
    if kind not in family.ropes:
        rope.refuse(spelling, f"one of {', '.join(family.ropes)}")
    return str(kind)


def _llama3(rope: Fields, original: int) -> Llama3:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"above low_freq_factor, which is {low}")
    return Llama3(rope.number("factor"), low, high, original)


def _yarn(rope: Fields, theta: float, positions: int, original: int) -> Yarn:
    if theta <= 1:
        rope.refuse("rope_theta", "above 1, as YaRN divides by its logarithm")
    factor = rope.number("factor", positions / original)
    if factor * original > MOST:
        rope.refuse("factor", f"at most {MOST / original:g}, as no model has more positions")
    mscale, mscale_all_dim = rope.number_or("mscale", 0), rope.number_or("mscale_all_dim", 0)
    usual = _mscale(factor, 1)
    if mscale and mscale_all_dim:
        usual = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return Yarn(
        factor=factor,
        attention_factor=rope.number("attention_factor", usual),
        beta_fast=rope.number_or("beta_fast", 32),
        beta_slow=rope.number_or("beta_slow", 1),
        truncate="truncate" not in rope.values or rope.flag("truncate"),
        original_max_position_embeddings=original,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0


def _longrope(rope: Fields, head_dim: int, positions: int, original: int) -> LongRope:
    factor = max(rope.number("factor", positions / original), 1.0)
    usual = math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return LongRope(
        short_factor=rope.numbers("short_factor", head_dim // 2),
        long_factor=rope.numbers("long_factor", head_dim // 2),
        attention_factor=rope.number("attention_factor", usual),
        original_max_position_embeddings=original,
    )


def _original(config: Fields, rope: Fields, family: Family, positions: int) -> int:
    """The positions that the scaling began with. transformers prefers those beside the scaling."""
    beside = config.whole_or_none(_ORIGINAL, family.original_positions)
    within = rope.whole_or_none(_ORIGINAL, None)
    if beside and within and beside != within:
        says = f"{beside}, as beside the scaling"
        if not config.values.get(_ORIGINAL):
            says += f", where {family.model_type} has {beside} unless config.json says otherwise"
        rope.refuse(_ORIGINAL, says)
    return beside or within or positions
