"""What a proof found: how far the fleet's log probabilities are from the trainer's, and the bound.

A trainer's log probabilities of the same tokens under the base model alone are the yardstick. Their
distance from the fleet's is the noise of dtypes and kernels, and no fault of the adapter.

The constants were chosen by the nine adapters of examples/tiny: all tokens of 8 prompts with their
answers, a float32 trainer, and mean distances in nats.

    the adapter itself on a CPU in float32      below 0.00001
    the adapter itself on an H100 in bfloat16   0.004 to 0.014: 0.2 to 0.9 times the base model's
    the base model on an H100 in bfloat16       0.007 to 0.029
    alpha halved or doubled                     0.038 to 1.5
    one of 5 layers missing                     0.018 to 2.8
    adapter ignored (the effect)                0.9 to 6.9

In float32 the bound refuses each of these faults. In bfloat16 one of 44 missing layers passes.

Where the adapter is sure of a token, the token tells little: on answers alone, doubling alpha moves
one adapter by 0.0009. So a proof had better hold the prompts' tokens, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NOISE_FACTOR = 2.0
"""How many times the base model's distance the adapter's may be."""
LEAST_BOUND = 0.002
"""Nats. In float32 the base model's distance is almost 0; a bound of almost 0 would be chance."""
MOST_BASE = 0.1
"""Nats. The most that the base model may be off, and be taken for the trainer's."""


@dataclass(frozen=True, slots=True)
class ProofResult:
    """Distances in nats: the mean and the largest of |fleet - trainer| over all scored tokens."""

    tokens: int
    mean: float
    """Under the adapter."""
    max: float
    base_mean: float
    """Under the base model alone."""
    base_max: float
    effect: float
    """The mean of |adapter - base| by the trainer: the distance of an adapter that is ignored."""
    time: float
    """Unix seconds."""

    @property
    def bound(self) -> float:
        """The most that `mean` may be."""
        return max(LEAST_BOUND, NOISE_FACTOR * self.base_mean)

    @property
    def fault(self) -> str:
        """Why the adapter is not proven, and what to do; empty if it is."""
        if not self.base_mean <= MOST_BASE:
            return (
                f"the base model alone is off by {self.base_mean:.4g} nats on average, more than "
                f"{MOST_BASE:g}: the proof was made with another base model, or a quantised one; "
                "make it with the one that is served here"
            )
        if not self.mean <= self.bound:
            return (
                f"the adapter is off by {self.mean:.4g} nats on average and {self.max:.4g} at most "
                f"over {self.tokens} tokens, the base model alone by {self.base_mean:.4g} and "
                f"{self.base_max:.4g}, and {self.bound:.4g} on average are allowed: the files are "
                "not those that the proof was made with, or its trainer computes them otherwise"
            )
        if self.effect <= self.bound:
            return (
                f"the adapter changes the proof's tokens by {self.effect:.4g} nats on average, "
                f"within the noise of {self.bound:.4g}, so they cannot tell it from the base "
                "model: give texts on which the adapter differs more"
            )
        return ""


def compare(
    expected: Sequence[float],
    found: Sequence[float],
    base_expected: Sequence[float],
    base_found: Sequence[float],
    time: float,
) -> ProofResult:
    """The distances between the trainer's and the fleet's log probabilities, equally long, in nats.

    `time`: Unix seconds.
    """
    off, base_off = _distances(expected, found), _distances(base_expected, base_found)
    effects = _distances(expected, base_expected)
    return ProofResult(
        tokens=len(off),
        mean=_mean(off),
        max=max(off),
        base_mean=_mean(base_off),
        base_max=max(base_off),
        effect=_mean(effects),
        time=time,
    )


def _distances(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
