"""The choice of the next token, row by row: greedy and sampled rows in one batch.

A sampled row goes through temperature, top-k, top-p and min-p, in this order, and then takes the
first token, in vocabulary order, at which the running sum of what is kept exceeds `uniform` times
the whole. Each filter keeps the tokens whose logit reaches a threshold, so tokens of equal logit
stay or go together:

    top-k: the k-th largest logit
    top-p: the largest logit for which those that reach it hold at least p of what top-k left
    min-p: tokens at least min_p times as likely as the likeliest

Thresholds are found bit by bit over the logits, not by sorting; they are exact but for the
rounding of the sums that top-p compares. A row's result does not depend on the others.

A row is sound if no logit is NaN and the largest is finite; -inf marks tokens that must not be
drawn. Whatever the numbers, a token is within the vocabulary: a row that is not sound, and one of
which the filters leave nothing, gives the token of its largest logit, NaN being above all others.
"""

import torch

from granatum.kernels.backend import (
    jit,
    overlap_options,
    require,
    require_rows,
    runs_kernel,
    tl,
    triton,
)
from granatum.kernels.sampling import reference

PROMPT_BIT = torch.iinfo(torch.int32).min
"""Set in a count of `counts`: the token is in the prompt. The other bits count it in the output."""

_NO_TOKEN = tl.constexpr(2147483647)
_LEAST = tl.constexpr(-(1 << 63))
_GREEDY_BLOCK = 4096
_SAMPLE_BLOCK = 2048
_PENALTY_BLOCK = 1024
_LEAST_HEAT, _MOST_HEAT = tl.constexpr(2.0**-126), tl.constexpr(2.0**126)
"""Temperatures beyond are taken as these, so that their inverse is a finite normal number."""
_INFINITE = tl.constexpr(0x7F800000)
"""The signed key of +inf; only NaN is above."""
_NEGATIVE_INFINITE = tl.constexpr(-0x7F800001)
"""The signed key of -inf, below all others."""


@jit()
def _load_logits(at, n, V):
    """Logits in float32, -inf beyond the vocabulary, and no negative zero."""
    values = tl.load(at + n, mask=n < V, other=-float("inf")).to(tl.float32)
    return tl.where(values == 0.0, 0.0, values)


@jit()
def _signed_key(logits):
    """An int32 of the same order as the float32."""
    bits = logits.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit()
def _order(logits):
    """The signed key, with every NaN above +inf, whatever its sign."""
    bits = logits.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > _INFINITE, 0x7FFFFFFF, _signed_key(logits))


@jit()
def _is_sound(order):
    """Whether a row is, by the largest order of its logits."""
    return (order < _INFINITE) & (order > _NEGATIVE_INFINITE)


@jit()
def _key(logits):
    """A uint32 of the same order as the float32."""
    return _signed_key(logits).to(tl.uint32, bitcast=True) ^ 0x80000000


@jit("blocks")
def _greedy_block_kernel(
    logits, keys, stride, blocks, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One block: the best of BLOCK logits of a row, as (order of logit, lowness of index)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    order = _order(_load_logits(logits + row * stride, n, V)).to(tl.int64)
    best = tl.max(tl.where(n < V, (order << 32) | (0x7FFFFFFF - n).to(tl.int64), _LEAST))
    tl.store(keys + row * blocks + block, best)


@jit("blocks")
def _greedy_kernel(
    keys, out, last, seats, sound, blocks, BLOCKS_POWER: tl.constexpr, PDL: tl.constexpr
):
    """One block: a row's best block."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS_POWER)
    found = tl.load(keys + row * blocks + block, mask=block < blocks, other=_LEAST)
    best = tl.max(found)
    token = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    tl.store(out + row, token)
    tl.store(last + tl.load(seats + row), token)
    if sound is not None:
        tl.store(sound + row, _is_sound((best >> 32).to(tl.int32)).to(tl.int32))


@jit()
def _threshold(
    at, V: tl.constexpr, top, inverse, floor, wanted, passes,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key that is reached by `wanted` tokens (or, by WEIGHTS, of the sum of weights).

    Only tokens whose key reaches `floor` count. Two bits a pass; no pass leaves 0.
    """
    key = tl.zeros((), tl.uint32)
    digit = tl.arange(0, 4)
    for step in range(passes):
        shift = 30 - 2 * step
        candidates = key + (digit.to(tl.uint32) << shift)
        sums = tl.zeros((4, BLOCK), tl.float32)
        for start in range(0, V, BLOCK):
            n = start + tl.arange(0, BLOCK)
            logits = _load_logits(at, n, V)
            keys = _key(logits)
            counted = (n < V) & (keys >= floor)
            if WEIGHTS:
                weights = tl.where(counted, tl.exp((logits - top) * inverse), 0.0)
            else:
                weights = tl.where(counted, 1.0, 0.0)
            sums += tl.where(keys[None, :] >= candidates[:, None], weights[None, :], 0.0)
        enough = (tl.sum(sums, axis=1) >= wanted) & (digit > 0)
        key += tl.sum(enough.to(tl.int32)).to(tl.uint32) << shift
    return key


@jit()
def _kept_weights(at, n, V, top, inverse, floor, min_p):
    """Weights, relative to the likeliest token's, of the tokens that all filters keep."""
    logits = _load_logits(at, n, V)
    weights = tl.exp((logits - top) * inverse)
    return tl.where((n < V) & (_key(logits) >= floor) & (weights >= min_p), weights, 0.0)


@jit()
def _sample_kernel(
    logits, temperature, top_k, top_p, min_p, uniform, out, sound, stride,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: a row."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    tops = tl.full((BLOCK,), _NEGATIVE_INFINITE, tl.int32)
    places = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        order = _order(_load_logits(at, n, V))
        better = order > tops
        tops = tl.where(better, order, tops)
        places = tl.where(better, n, places)
    most = tl.max(tops)
    best = tl.min(tl.where(tops == most, places, _NO_TOKEN))
    token = best
    heat = tl.load(temperature + row)
    is_sound = _is_sound(most)
    if (heat > 0.0) & is_sound:
        top = _signed_key(most.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
        inverse = 1.0 / tl.minimum(tl.maximum(heat, _LEAST_HEAT), _MOST_HEAT)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least = tl.load(min_p + row)
        none = tl.zeros((), tl.uint32)
        passes = tl.where((k > 0) & (k < V), 16, 0)
        floor = _threshold(at, V, top, inverse, none, k.to(tl.float32), passes, False, BLOCK)
        passes = tl.where(p < 1.0, 16, 0)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, tl.where(p < 1.0, V, 0), BLOCK):
            sums += _kept_weights(at, start + tl.arange(0, BLOCK), V, top, inverse, floor, 0.0)
        wanted = p * tl.sum(sums)
        nucleus = _threshold(at, V, top, inverse, floor, wanted, passes, True, BLOCK)
        nucleus = tl.minimum(nucleus, _key(top))  # the likeliest stay, however little is wanted
        floor = tl.maximum(floor, nucleus)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            sums += _kept_weights(at, start + tl.arange(0, BLOCK), V, top, inverse, floor, least)
        target = tl.load(uniform + row) * tl.sum(sums)
        before = 0.0
        last = -1
        token = _NO_TOKEN
        for start in range(0, V, BLOCK):
            n = start + tl.arange(0, BLOCK)
            weights = _kept_weights(at, n, V, top, inverse, floor, least)
            running = before + tl.cumsum(weights, axis=0)
            token = tl.minimum(token, tl.min(tl.where(running > target, n, _NO_TOKEN)))
            last = tl.maximum(last, tl.max(tl.where(weights > 0.0, n, -1)))
            before = tl.max(running)
        token = tl.minimum(token, last)  # rounding may leave the target beyond the last sum
        token = tl.where(last < 0, best, token)  # the filters left nothing
    tl.store(out + row, token)
    if sound is not None:
        tl.store(sound + row, is_sound.to(tl.int32))


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


def greedy_workspace_elements(rows: int, vocabulary: int) -> int:
    """Int64 elements of workspace that `greedy` needs."""
    return rows * -(-vocabulary // _GREEDY_BLOCK)


def greedy(
    logits: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    last: torch.Tensor,
    seats: torch.Tensor,
    sound: torch.Tensor | None = None,
) -> None:
    """out[t] = last[seats[t]] = the token of the largest logit, the lowest such token.

    logits [T, vocabulary], any float dtype; out, seats int [T]; last int [seats]; of rows with one
    seat, any remains in it. workspace int64, `greedy_workspace_elements` at least. sound int [T],
    or None if nobody asks: 1 for a sound row, else 0.
    """
    rows, vocabulary = _require_logits(logits)
    if not runs_kernel(logits):
        reference.greedy(logits, out, sound)
        last[seats.long()] = out.to(last.dtype)
        return
    blocks = triton.cdiv(vocabulary, _GREEDY_BLOCK)
    fits = workspace.dtype == torch.int64 and workspace.numel() >= rows * blocks
    require(fits, f"the workspace must be {rows * blocks} int64 elements")
    _greedy_block_kernel[(rows, blocks)](
        logits,
        workspace,
        logits.stride(0),
        blocks,
        V=vocabulary,
        BLOCK=_GREEDY_BLOCK,
        num_warps=4,
        **overlap_options(logits),
    )
    power = triton.next_power_of_2(blocks)
    _greedy_kernel[(rows,)](
        workspace,
        out,
        last,
        seats,
        sound,
        blocks,
        BLOCKS_POWER=power,
        num_warps=1,
        **overlap_options(logits),
    )


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    out: torch.Tensor,
    sound: torch.Tensor | None = None,
) -> None:
    """out[t] = the token that row t draws; the likeliest, the lowest of such, at temperature 0.

    logits [T, vocabulary], any float dtype. Per row [T]: float32 temperature, top_p (from 1 on:
    no filter), min_p (0: none), uniform in [0, 1); int32 top_k (0: none). out int [T]; sound as
    in `greedy`.
    """
    rows, vocabulary = _require_logits(logits)
    for name, parameter in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        require(parameter.shape == (rows,), f"{name} must be [{rows}]")
    if not runs_kernel(logits):
        reference.sample(logits, temperature, top_k, top_p, min_p, uniform, out, sound)
        return
    _sample_kernel[(rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        out,
        sound,
        logits.stride(0),
        V=vocabulary,
        BLOCK=min(_SAMPLE_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )


def penalize(
    logits: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Change, in place, the logits of tokens that a row's sequence has seen.

    Tokens in prompt or output: positive logits are divided by `repetition`, others multiplied.
    Then, of tokens in the output: minus `frequency` per occurrence, minus `presence` once.

    logits [T, vocabulary]; counts int32 [slots, vocabulary], see PROMPT_BIT; slots int [T], the
    row's in counts, negative: left alone; float32 [T] each of the penalties.
    """
    rows, vocabulary = _require_logits(logits)
    require_rows("counts", counts, (counts.shape[0], vocabulary))
    if not runs_kernel(logits):
        reference.penalize(logits, counts, slots, repetition, presence, frequency)
        return
    _penalize_kernel[(rows, triton.cdiv(vocabulary, _PENALTY_BLOCK))](
        logits,
        counts,
        slots,
        repetition,
        presence,
        frequency,
        logits.stride(0),
        counts.stride(0),
        V=vocabulary,
        BLOCK=_PENALTY_BLOCK,
        num_warps=4,
    )


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
    """Make a slot that of a sequence: int64 ids of its prompt and of its output so far."""
    row = counts[slot]
    row.zero_()
    row.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
    row[prompt] = row[prompt].bitwise_or(PROMPT_BIT)


def _require_logits(logits: torch.Tensor) -> tuple[int, int]:
    require(logits.dim() == 2, "logits must be [T, vocabulary]")
    rows, vocabulary = logits.shape
    require_rows("logits", logits, (rows, vocabulary))
    return rows, vocabulary
