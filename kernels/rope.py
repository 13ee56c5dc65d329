"""Rotary positions, with the write of keys and values into the arena's pages."""

import torch

from granatum.kernels import reference_layer as reference
from granatum.kernels.backend import (
    jit,
    overlap_options,
    require,
    require_rows,
    runs_kernel,
    tl,
    triton,
)
from granatum.kernels.layout import KvLayout


@jit()
def _normed_halves(at, half, inside, weight, eps, D: tl.constexpr, NORM: tl.constexpr):
    """A head's two halves in float32, normalised if asked for."""
    low = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + D // 2 + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low) + tl.sum(high * high)) / D + eps)
        low *= scale * tl.load(weight + half, mask=inside, other=0.0).to(tl.float32)
        high *= scale * tl.load(weight + D // 2 + half, mask=inside, other=0.0).to(tl.float32)
    return low, high


@jit("layer")
def _rope_kernel(
    q, k, v, positions, cos, sin, arena, kv_slots, q_norm, k_norm,
    q_stride, k_stride, v_stride, page_elements, layer, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block: a head of a row; first those of q, then of k, each of k with its v."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(kv_slots + row).to(tl.int64)
    half = tl.arange(0, HALF)
    inside = half < D // 2
    position = tl.load(positions + row, mask=slot >= 0, other=0).to(tl.int64)
    c = tl.load(cos + position * (D // 2) + half, mask=inside, other=0.0)
    s = tl.load(sin + position * (D // 2) + half, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if slot >= 0:
        if head < HEADS:
            at = q + row * q_stride + head * D
            low, high = _normed_halves(at, half, inside, q_norm, eps, D, NORM)
            tl.store(at + half, low * c - high * s, mask=inside)
            tl.store(at + D // 2 + half, high * c + low * s, mask=inside)
        else:
            head -= HEADS
            at = k + row * k_stride + head * D
            low, high = _normed_halves(at, half, inside, k_norm, eps, D, NORM)
            token = slot % PAGE_TOKENS
            plane = (layer * 2 * KV_HEADS + head) * PAGE_TOKENS + token
            k_at = arena + slot // PAGE_TOKENS * page_elements + plane * D
            tl.store(k_at + half, low * c - high * s, mask=inside)
            tl.store(k_at + D // 2 + half, high * c + low * s, mask=inside)
            v_at = v + row * v_stride + head * D
            to = k_at + KV_HEADS * PAGE_TOKENS * D
            tl.store(to + half, tl.load(v_at + half, mask=inside), mask=inside)
            moved = tl.load(v_at + D // 2 + half, mask=inside)
            tl.store(to + D // 2 + half, moved, mask=inside)


def rope_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    arena: torch.Tensor,
    kv: KvLayout,
    layer: int,
    kv_slots: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Rotate q in place; write rotated k, and v, into the arena. k and v stay as they are.

    With a row's angle table c, s [head_dim / 2] at its position, and x = (low, high) halves of a
    head: (low c - high s, high c + low s), as Hugging Face's Llama does. With q_norm and k_norm
    [head_dim], each head is RMS-normalised first (Qwen3).

    q [T, heads * head_dim], k, v [T, kv_heads * head_dim]: views of the fused projections' output,
    their rows evenly apart. positions int [T]; cos, sin float32 [positions, head_dim / 2].
    kv_slots int [T]: page * page_tokens + place in the page; negative: a padding row, left alone.
    """
    rows, d = q.shape[0], kv.head_dim
    heads = q.shape[1] // d
    require_rows("q", q, (rows, heads * d))
    require_rows("k", k, (rows, kv.kv_heads * d))
    require_rows("v", v, (rows, kv.kv_heads * d))
    require(d % 2 == 0, f"head_dim must be even, not {d}")
    require((q_norm is None) == (k_norm is None), "q_norm and k_norm come together")
    require(positions.shape == kv_slots.shape == (rows,), "positions and kv_slots must be [T]")
    require(cos.is_contiguous() and sin.is_contiguous(), "cos and sin must be contiguous")
    if not runs_kernel(q):
        reference.rope_and_write_kv(
            q, k, v, positions, cos, sin, arena, kv, layer, kv_slots, q_norm, k_norm, eps
        )
        return
    _rope_kernel[(rows, heads + kv.kv_heads)](
        q,
        k,
        v,
        positions,
        cos,
        sin,
        arena,
        kv_slots,
        q_norm,
        k_norm,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        kv.page_elements,
        layer,
        eps,
        HEADS=heads,
        KV_HEADS=kv.kv_heads,
        D=d,
        HALF=triton.next_power_of_2(d // 2),
        PAGE_TOKENS=kv.page_tokens,
        NORM=q_norm is not None,
        num_warps=1,
        **overlap_options(q),
    )
