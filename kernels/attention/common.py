"""Attention over the arena's pages: what decode steps and prompts' chunks share.

    out = softmax(scale * q K^T) V    over a sequence's tokens up to the row's own, per head;
                                      query head h reads kv head h * kv_heads / heads

A row's result depends on the row's own sequence and on shapes alone.
"""

import torch

from granatum.kernels.backend import jit, require, require_rows, tl
from granatum.kernels.layout import KvLayout

LOG2_E = 1.4426950408889634
NEVER = tl.constexpr(-1e30)
"""Below every score. It is finite, because the difference of infinities is NaN."""


@jit()
def token_offsets(
    table, t, length, page_elements, head, PAGE_TOKENS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Element offsets of tokens t of a head, from the start of the layer's keys or values."""
    page = tl.load(table + t // PAGE_TOKENS, mask=t < length, other=0).to(tl.int64)
    return page * page_elements + (head * PAGE_TOKENS + t % PAGE_TOKENS) * D


@jit()
def softmax_step(scores, top, total, AXIS: tl.constexpr):
    """Go on with a running softmax: the scores' weights, the new maximum, the new sum, and the
    factor by which older sums shrink."""
    new_top = tl.maximum(top, tl.max(scores, axis=AXIS))
    kept = tl.exp2(top - new_top)
    weights = tl.exp2(scores - tl.expand_dims(new_top, AXIS))
    return weights, new_top, total * kept + tl.sum(weights, axis=AXIS), kept


def require_queries(q: torch.Tensor, out: torch.Tensor, kv: KvLayout) -> tuple[int, int]:
    """Rows and query heads of q.

    Raises:
        ValueError: q or out has a shape or stride that attention cannot take.
    """
    rows, width = q.shape
    require_rows("q", q, (rows, width))
    require_rows("out", out, (rows, width))
    require(width % (kv.kv_heads * kv.head_dim) == 0, f"q's width {width} does not fit {kv}")
    return rows, width // kv.head_dim
