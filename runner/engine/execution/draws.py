"""Randomness of sampling: a function of the request's seed and the token's position alone."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), evenly spread over seeds and positions.

    `position` is the token's index in its sequence, prompt included, so that a resumed sequence
    draws what it would have drawn.
    """
    drawn = _mix(_mix(seed & _MASK) + (position + 1) * _GOLDEN)
    return (drawn >> 40) / (1 << 24)  # 24 bits: exact in float32, and below one


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
