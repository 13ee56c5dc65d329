"""How a model's `rope_type` changes the plain rotary frequencies: one record for each kind.

Each kind computes what the function of its name in transformers' `modeling_rope_utils` computes.
The fields have the names that config.json gives them. What config.json leaves out is filled in.
"""

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Scaling:
    """The kind `default`, which changes nothing."""

    kind: ClassVar[str] = "default"

    def scaled(self, plain: list[float], theta: float) -> list[float]:  # noqa: ARG002
        """Radians per position of each pair; `plain` are those of `theta` without a scaling."""
        return plain

    @property
    def amplitude(self) -> float:
        """What multiplies every cosine and sine."""
        return 1.0

    @property
    def positions(self) -> int:
        """How many positions the scaling is made for; 0: it does not say."""
        return 0

    @property
    def exact_positions(self) -> int | None:
        """The most tokens of a sequence for which the frequencies hold; None: any number."""
        return None


UNSCALED = Scaling()


@dataclass(frozen=True, slots=True)
class Linear(Scaling):
    """Every frequency is divided by `factor`."""

    kind = "linear"
    factor: float

    def scaled(self, plain: list[float], theta: float) -> list[float]:  # noqa: ARG002
        """As in `Scaling`."""
        return [frequency / self.factor for frequency in plain]


@dataclass(frozen=True, slots=True)
class Llama3(Scaling):
    """Frequencies of few turns within the original positions are divided by `factor`."""

    kind = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, plain: list[float], theta: float) -> list[float]:  # noqa: ARG002
        """As in `Scaling`."""
        return [self._scaled(frequency) for frequency in plain]

    def _scaled(self, frequency: float) -> float:
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        return _mixed(frequency, self.factor, (turns - self.low_freq_factor) / span)


@dataclass(frozen=True, slots=True)
class Yarn(Scaling):
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over the pairs, from kept to divided."""

    kind = "yarn"
    factor: float
    attention_factor: float
    beta_fast: float
    """Turns within the original positions that the pair makes where the ramp begins."""
    beta_slow: float
    """Turns that the pair makes where the ramp ends."""
    truncate: bool
    """Whether the ramp begins and ends at whole pairs."""
    original_max_position_embeddings: int

    def scaled(self, plain: list[float], theta: float) -> list[float]:
        """As in `Scaling`."""
        dim = 2 * len(plain)
        low, high = (self._pair(turns, dim, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = high - low or 0.001
        return [
            _mixed(frequency, self.factor, 1 - (pair - low) / span)
            for pair, frequency in enumerate(plain)
        ]

    def _pair(self, turns: float, dim: int, theta: float) -> float:
        """The pair, between two pairs as a rule, that makes `turns` turns."""
        longest = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(longest) / (2 * math.log(theta))

    @property
    def amplitude(self) -> float:
        """As in `Scaling`."""
        return self.attention_factor

    @property
    def positions(self) -> int:
        """As in `Scaling`: model cards add YaRN to a config.json and leave the rest as it was."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True, slots=True)
class LongRope(Scaling):
    """LongRoPE: every pair has a divisor of its own, and another one in long sequences.

    transformers takes `short_factor` up to the original positions and `long_factor` for all tokens
    of a longer sequence. So a sequence that grows longer would need all its KV again.
    """

    kind = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int

    def scaled(self, plain: list[float], theta: float) -> list[float]:  # noqa: ARG002
        """As in `Scaling`."""
        return [f / divisor for f, divisor in zip(plain, self.short_factor, strict=True)]

    @property
    def amplitude(self) -> float:
        """As in `Scaling`."""
        return self.attention_factor

    @property
    def exact_positions(self) -> int | None:
        """As in `Scaling`."""
        return self.original_max_position_embeddings


def _mixed(frequency: float, factor: float, keep: float) -> float:
    """The frequency where `keep` is 1 or more, divided by `factor` where it is 0 or less."""
    keep = min(max(keep, 0.0), 1.0)
    return keep * frequency + (1 - keep) * frequency / factor
