"""Rotary positions, with the write of keys and values into the arena's pages."""

from math import gcd

import torch

from granatum.kernels.backend import (
    jit,
    overlap_options,
    require_rows,
    runs_kernel,
    tl,
    triton,
)
from granatum.kernels.layer import reference
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces

_BLOCK_HEADS = 8
"""The most heads of a row that a block takes, one warp each. With one head a block took longer to
start than to compute."""


@jit()
def load_angles(cos, sin, position, d, inside, D: tl.constexpr):
    """The cosine that multiplies dimension d, and the signed sine that multiplies d's partner.

    Both have the shape of `inside` [N, BLOCK_D], so that they lie in the threads that hold heads.
    """
    d = d[None, :] + tl.zeros(inside.shape, tl.int32)
    at = position.to(tl.int64) * (D // 2) + d % (D // 2)
    s = tl.load(sin + at, mask=inside, other=0.0)
    return tl.load(cos + at, mask=inside, other=0.0), tl.where(d < D // 2, -s, s)


@jit()
def load_rotated(at, d, inside, c, s, weight, eps, D: tl.constexpr):
    """Load heads [N, BLOCK_D] that begin at `at` [N, 1]; normalise them if there is a weight, then
    rotate them, in float32."""
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    x = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(at + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x *= scale * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        partner *= scale * tl.load(weight + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return x * c + partner * s


@jit("layer")
def _rope_kernel(
    q, k, v, positions, cos, sin, arena, kv_slots, q_norm, k_norm,
    q_stride, k_stride, v_stride, page_elements, layer, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, PAGE_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: BLOCK_HEADS heads of a row. Heads count through q, then through k; a block of k's
    heads moves their v as well."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    slot = tl.load(kv_slots + row).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    position = tl.load(positions + row, mask=slot >= 0, other=0)
    inside = (head >= 0) & (d < D)[None, :]
    c, s = load_angles(cos, sin, position, d, inside, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if slot >= 0:
        if tl.program_id(1) * BLOCK_HEADS < HEADS:
            at = q + row * q_stride + head * D
            turned = load_rotated(at, d, inside, c, s, q_norm, eps, D)
            tl.debug_barrier()  # every element was read by two threads
            tl.store(at + d[None, :], turned, mask=inside)
        else:
            head -= HEADS
            turned = load_rotated(k + row * k_stride + head * D, d, inside, c, s, k_norm, eps, D)
            plane = (layer * 2 * KV_HEADS + head) * PAGE_TOKENS + slot % PAGE_TOKENS
            to = arena + slot // PAGE_TOKENS * page_elements + plane * D + d[None, :]
            tl.store(to, turned, mask=inside)
            moved = tl.load(v + row * v_stride + head * D + d[None, :], mask=inside)
            tl.store(to + KV_HEADS * PAGE_TOKENS * D, moved, mask=inside)


def rope_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: Rotary,
    kv: LayerKv,
    places: RowPlaces,
) -> None:
    """Rotate q in place; write rotated k, and v, into the arena. k and v stay as they are.

    Let c, s [head_dim / 2] be the angles' cosine and sine at a row's position, and (low, high) the
    halves of a head. The rotated head is (low c - high s, high c + low s), as in Hugging Face's
    Llama. Where `rotary` has norms, each head is RMS-normalised first.

    q [T, heads * head_dim], k, v [T, kv_heads * head_dim]: views of the fused projections' output,
    their rows evenly apart. A row without a place in the arena is left alone.

    Raises:
        ValueError: a shape or stride that the op cannot take.
    """
    layout = kv.layout
    rows, d, kv_heads = q.shape[0], layout.head_dim, layout.kv_heads
    heads = q.shape[1] // d
    require_rows("q", q, (rows, heads * d))
    require_rows("k", k, (rows, kv_heads * d))
    require_rows("v", v, (rows, kv_heads * d))
    rotary.require(d)
    places.require(rows)
    if not runs_kernel(q):
        reference.rope_and_write_kv(q, k, v, rotary, kv, places)
        return
    block_heads = gcd(heads, kv_heads, _BLOCK_HEADS)
    _rope_kernel[(rows, (heads + kv_heads) // block_heads)](
        q, k, v, places.positions, rotary.cos, rotary.sin, kv.arena, places.kv_slots,
        rotary.q_norm, rotary.k_norm, q.stride(0), k.stride(0), v.stride(0), layout.page_elements,
        kv.layer, rotary.eps, HEADS=heads, KV_HEADS=kv_heads, D=d,
        BLOCK_D=triton.next_power_of_2(d), BLOCK_HEADS=block_heads, PAGE_TOKENS=layout.page_tokens,
        num_warps=block_heads, **overlap_options(q),
    )  # fmt: skip
