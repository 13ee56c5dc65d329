"""The draw of the next token, row by row; greedy and sampled rows may share a batch.

A sampled row goes through temperature, top-k, top-p and min-p, in this order. Then it takes the
first token, in vocabulary order, at which the running sum of what is kept exceeds `uniform` times
the whole. Each filter keeps the tokens whose logit reaches a threshold, so tokens of equal logit
stay or go together:

    top-k: the k-th largest logit
    top-p: the largest logit L for which tokens with logit >= L hold at least p of what top-k left
    min-p: tokens at least min_p times as likely as the likeliest

Thresholds are found bit by bit over the logits, not by sorting. They are exact but for the rounding
of the sums that top-p compares. A row's result does not depend on the others. If the filters leave
nothing of a row, it gives the token of its largest logit.
"""

import torch

from granatum.kernels.backend import jit, require, runs_kernel, tl, triton
from granatum.kernels.sampling import reference
from granatum.kernels.sampling.logits import (
    NEGATIVE_INFINITE,
    is_sound_order,
    key_of,
    load_logits,
    order_of,
    require_logits,
    signed_key,
)

_NO_TOKEN = tl.constexpr(2147483647)
_BLOCK = 2048
_LEAST_HEAT, _MOST_HEAT = tl.constexpr(2.0**-126), tl.constexpr(2.0**126)
"""Lower and higher temperatures count as these, so that the inverse is a finite normal number."""


@jit()
def _threshold(
    at, V: tl.constexpr, top, inverse, floor, wanted, passes,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key that at least `wanted` tokens reach.

    With WEIGHTS: the largest key that tokens of summed weight `wanted` reach.

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
            logits = load_logits(at, n, V)
            keys = key_of(logits)
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
    logits = load_logits(at, n, V)
    weights = tl.exp((logits - top) * inverse)
    return tl.where((n < V) & (key_of(logits) >= floor) & (weights >= min_p), weights, 0.0)


@jit()
def _sample_kernel(
    logits, temperature, top_k, top_p, min_p, uniform, out, sound, stride,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: a row."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    tops = tl.full((BLOCK,), NEGATIVE_INFINITE, tl.int32)
    places = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        order = order_of(load_logits(at, n, V))
        better = order > tops
        tops = tl.where(better, order, tops)
        places = tl.where(better, n, places)
    most = tl.max(tops)
    best = tl.min(tl.where(tops == most, places, _NO_TOKEN))
    token = best
    heat = tl.load(temperature + row)
    is_sound = is_sound_order(most)
    if (heat > 0.0) & is_sound:
        top = signed_key(most.to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
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
        nucleus = tl.minimum(nucleus, key_of(top))  # the likeliest stay, however little is wanted
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
    in `greedy.greedy`.

    Raises:
        ValueError: a shape or stride that the op cannot take.
    """
    rows, vocabulary = require_logits(logits)
    for name, parameter in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        require(parameter.shape == (rows,), f"{name} must be [{rows}]")
    if not runs_kernel(logits):
        reference.sample(logits, temperature, top_k, top_p, min_p, uniform, out, sound)
        return
    _sample_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, uniform, out, sound, logits.stride(0),
        V=vocabulary, BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
