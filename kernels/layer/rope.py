"""Rotary positions, with the write of keys and values into the arena's pages."""

from dataclasses import dataclass
from math import gcd

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
from granatum.kernels.layer import reference
from granatum.kernels.layout import KvLayout

_BLOCK_HEADS = 8
"""Of a row that a block takes at most, a warp each: a block of one took longer to start than to do.
"""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles of every position, float32 [positions, head_dim / 2]; weights [head_dim] of the norm
    that Qwen3 applies to each head first."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6

    def require(self, head_dim: int) -> None:
        """Refuse what no kernel takes.

        Raises:
            ValueError: naming it.
        """
        require(head_dim % 2 == 0, f"head_dim must be even, not {head_dim}")
        require((self.q_norm is None) == (self.k_norm is None), "q_norm and k_norm come together")
        contiguous = self.cos.is_contiguous() and self.sin.is_contiguous()
        require(contiguous, "cos and sin must be contiguous")


@jit()
def load_angles(cos, sin, position, d, inside, D: tl.constexpr):
    """Cosine and signed sine by which dimension d of a head and its partner are multiplied.

    As `inside` [N, BLOCK_D] is shaped, and then held by the threads that hold such heads.
    """
    d = d[None, :] + tl.zeros(inside.shape, tl.int32)
    at = position.to(tl.int64) * (D // 2) + d % (D // 2)
    s = tl.load(sin + at, mask=inside, other=0.0)
    return tl.load(cos + at, mask=inside, other=0.0), tl.where(d < D // 2, -s, s)


@jit()
def load_rotated(at, d, inside, c, s, weight, eps, D: tl.constexpr):
    """Heads [N, BLOCK_D] from at [N, 1], normalised if there is a weight, rotated, in float32."""
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
    """One block: some heads of a row; first those of q, then of k, each of k with its v."""
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
    positions: torch.Tensor,
    rotary: Rotary,
    arena: torch.Tensor,
    kv: KvLayout,
    layer: int,
    kv_slots: torch.Tensor,
) -> None:
    """Rotate q in place; write rotated k, and v, into the arena. k and v stay as they are.

    With a row's angle table c, s [head_dim / 2] at its position, and x = (low, high) halves of a
    head: (low c - high s, high c + low s), as Hugging Face's Llama does. With norms, each head is
    RMS-normalised first.

    q [T, heads * head_dim], k, v [T, kv_heads * head_dim]: views of the fused projections' output,
    their rows evenly apart. positions int [T]. kv_slots int [T]: page * page_tokens + place in the
    page; negative: a row that is left alone.
    """
    rows, d = q.shape[0], kv.head_dim
    heads = q.shape[1] // d
    require_rows("q", q, (rows, heads * d))
    require_rows("k", k, (rows, kv.kv_heads * d))
    require_rows("v", v, (rows, kv.kv_heads * d))
    rotary.require(d)
    require(positions.shape == kv_slots.shape == (rows,), "positions and kv_slots must be [T]")
    if not runs_kernel(q):
        reference.rope_and_write_kv(q, k, v, positions, rotary, arena, kv, layer, kv_slots)
        return
    block_heads = gcd(heads, kv.kv_heads, _BLOCK_HEADS)
    _rope_kernel[(rows, (heads + kv.kv_heads) // block_heads)](
        q,
        k,
        v,
        positions,
        rotary.cos,
        rotary.sin,
        arena,
        kv_slots,
        rotary.q_norm,
        rotary.k_norm,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        kv.page_elements,
        layer,
        rotary.eps,
        HEADS=heads,
        KV_HEADS=kv.kv_heads,
        D=d,
        BLOCK_D=triton.next_power_of_2(d),
        BLOCK_HEADS=block_heads,
        PAGE_TOKENS=kv.page_tokens,
        num_warps=block_heads,
        **overlap_options(q),
    )
