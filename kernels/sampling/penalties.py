"""What a sequence's own tokens do to the logits of its next one."""

import torch

from granatum.kernels.backend import jit, require_rows, runs_kernel, tl, triton
from granatum.kernels.sampling import reference
from granatum.kernels.sampling.logits import require_logits

PROMPT_BIT = torch.iinfo(torch.int32).min
"""Bit of a count: the token is in the prompt. The other bits count the token in the output."""
_BLOCK = 1024


@jit("counts_stride")
def _penalize_kernel(
    logits, counts, slots, repetition, presence, frequency, stride, counts_stride,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK tokens of a row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        state = tl.load(counts + slot * counts_stride + n, mask=n < V, other=0)
        values = tl.load(logits + row * stride + n, mask=n < V, other=0.0).to(tl.float32)
        factor = tl.load(repetition + row)
        repeated = tl.where(values > 0, values / factor, values * factor)
        values = tl.where(state != 0, repeated, values)
        times = (state & 0x7FFFFFFF).to(tl.float32)
        values -= tl.load(frequency + row) * times
        values -= tl.where(times > 0, tl.load(presence + row), 0.0)
        tl.store(logits + row * stride + n, values, mask=(n < V) & (state != 0))


@jit("counts_stride", "vocabulary")
def _count_tokens_kernel(counts, slots, tokens, counts_stride, vocabulary):
    """One block: a row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    token = tl.load(tokens + row)
    if (slot >= 0) & (token >= 0) & (token < vocabulary):
        at = counts + slot * counts_stride + token
        tl.store(at, tl.load(at) + 1)


def penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Change, in place, the logits of tokens that a row's sequence has seen.

    Tokens in prompt or output: a positive logit is divided by `repetition`, any other is multiplied
    by it.
    Then, of tokens in the output: minus `frequency` per occurrence, minus `presence` once.

    logits [T, vocabulary]; counts int32 [slots, vocabulary], see PROMPT_BIT; slots int [T], the
    row's in counts, negative: left alone; float32 [T] each of the penalties.
    """
    rows, vocabulary = require_logits(logits)
    require_rows("counts", counts, (counts.shape[0], vocabulary))
    if not runs_kernel(logits):
        reference.penalize(logits, counts, slots, repetition, presence, frequency)
        return
    _penalize_kernel[(rows, triton.cdiv(vocabulary, _BLOCK))](
        logits, counts, slots, repetition, presence, frequency, logits.stride(0),
        counts.stride(0), V=vocabulary, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def count_tokens(counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count each row's new token in its sequence's output: counts[slots[t], tokens[t]] += 1.

    No slot may stand in two rows; rows of a negative slot are left out, and tokens that are not in
    the vocabulary. tokens int [T].
    """
    if not runs_kernel(counts):
        reference.count_tokens(counts, slots, tokens)
        return
    _count_tokens_kernel[(slots.shape[0],)](
        counts, slots, tokens, counts.stride(0), counts.shape[1], num_warps=1
    )


def start_counts(
    counts: torch.Tensor, slot: int, prompt: torch.Tensor, generated: torch.Tensor
) -> None:
    """Make `slot` count one sequence: int64 ids of its prompt, and of its output so far."""
    row = counts[slot]
    row.zero_()
    row.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
    row[prompt] = row[prompt].bitwise_or(PROMPT_BIT)
