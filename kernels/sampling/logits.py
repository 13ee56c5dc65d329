"""Rows of logits: how they are read, ordered and judged.

A row is sound if no logit is NaN and the largest is finite; -inf marks tokens that must not be
drawn. Whatever the numbers, a token is within the vocabulary: a row that is not sound gives the
token of its largest logit, where NaN is above all others.
"""

import torch

from granatum.kernels.backend import jit, require, require_rows, tl

_INFINITE = tl.constexpr(0x7F800000)
"""The signed key of +inf; only NaN is above."""
NEGATIVE_INFINITE = tl.constexpr(-0x7F800001)
"""The signed key of -inf, below all others."""


@jit()
def load_logits(at, n, V):
    """Logits in float32, -inf beyond the vocabulary, and no negative zero."""
    values = tl.load(at + n, mask=n < V, other=-float("inf")).to(tl.float32)
    return tl.where(values == 0.0, 0.0, values)


@jit()
def signed_key(logits):
    """An int32 of the same order as the float32."""
    bits = logits.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit()
def order_of(logits):
    """The signed key, with every NaN above +inf, whatever its sign."""
    bits = logits.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > _INFINITE, 0x7FFFFFFF, signed_key(logits))


@jit()
def is_sound_order(order):
    """Whether a row is sound, by the largest order of its logits."""
    return (order < _INFINITE) & (order > NEGATIVE_INFINITE)


@jit()
def key_of(logits):
    """A uint32 of the same order as the float32."""
    return signed_key(logits).to(tl.uint32, bitcast=True) ^ 0x80000000


def require_logits(logits: torch.Tensor) -> tuple[int, int]:
    """Rows and vocabulary of logits.

    Raises:
        ValueError: they are not [T, vocabulary], with adjacent elements in a row.
    """
    require(logits.dim() == 2, "logits must be [T, vocabulary]")
    rows, vocabulary = logits.shape
    require_rows("logits", logits, (rows, vocabulary))
    return rows, vocabulary
