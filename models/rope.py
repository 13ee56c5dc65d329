"""Rotary position embeddings, as config.json describes them."""

import math
from dataclasses import dataclass
from typing import Any

from granatum.models.config_fields import Fields

_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: frequencies theta^(-2i/d), scaled as Llama 3 or linear scaling do."""

    theta: float = _THETA
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

    @property
    def settings(self) -> dict[str, Any]:
        """The same as `rope_parameters` of config.json, every number a float."""
        if self.low_freq_factor is not None:
            return {
                "rope_type": "llama3",
                "rope_theta": self.theta,
                "factor": self.factor,
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": float(self.original_positions),
            }
        if self.factor != 1.0:
            return {"rope_type": "linear", "rope_theta": self.theta, "factor": self.factor}
        return {"rope_type": "default", "rope_theta": self.theta}


PLAIN = Rope()


def read_rope(config: Fields, kinds: tuple[str, ...], max_positions: int) -> Rope:
    """The rotary settings, whether transformers 4 or 5 wrote them.

    Version 4 has `rope_scaling`, and everything else beside it. Version 5 has `rope_parameters`.
    Raises InvalidRequest unless the scaling is one of `kinds`.
    """
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    rope = config.inner(name)
    for field, value in rope.values.items():
        if isinstance(value, dict):
            rope.refuse(field, "a setting of all layers")
    for fields in (config, rope):
        fields.require("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta", config.number("rope_theta", _THETA))
    spelling = "rope_type" if rope.values.get("rope_type") else "type"
    kind = rope.values.get(spelling) or "default"
    if kind not in kinds:
        rope.refuse(spelling, f"one of {', '.join(kinds)}")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, rope.number("factor"))
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"above low_freq_factor, which is {low}")
    return Rope(theta, rope.number("factor"), low, high, _original(config, rope, max_positions))


def _original(config: Fields, rope: Fields, max_positions: int) -> int:
    """The positions that the scaling began with. transformers prefers those beside the scaling."""
    name = "original_max_position_embeddings"
    beside = config.whole_or_none(name, None)
    within = rope.whole_or_none(name, None)
    if beside and within and beside != within:
        rope.refuse(name, f"{beside}, as it stands beside the scaling")
    return beside or within or max_positions
