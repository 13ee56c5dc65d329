"""The torch twins of norms, positions and activation: specification and CPU backend.

Arguments and effects are those of the launchers of the same names.
"""

import torch

from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces


def embed_rms_norm(
    tokens: torch.Tensor, last: torch.Tensor, embedding: torch.Tensor, weight: torch.Tensor,
    eps: float, residual: torch.Tensor, out: torch.Tensor, *, scale: float,
) -> None:  # fmt: skip
    """As `norm.embed_rms_norm`."""
    drawn = last[(-1 - tokens).clamp(min=0)]
    residual.copy_(scale * embedding[torch.where(tokens < 0, drawn, tokens)].float())
    _rms_norm(residual, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor,
    rows: torch.Tensor | None = None, *, scale: float,
) -> None:  # fmt: skip
    """As `norm.add_rms_norm`."""
    if rows is not None:
        x, residual = x[rows], residual[rows]
    residual.copy_(residual.float() + scale * x.float())
    _rms_norm(residual, weight, eps, out)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    values = x.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    out.copy_(values * scale * weight.float())


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """As `activation.silu_mul`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def rope_and_write_kv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary, kv: LayerKv,
    places: RowPlaces,
) -> None:  # fmt: skip
    """As `rope.rope_and_write_kv`."""
    used = (places.kv_slots >= 0).nonzero().squeeze(1)
    where, place = places.positions[used].long(), places.kv_slots[used].long()
    angles = rotary.cos[where].unsqueeze(1), rotary.sin[where].unsqueeze(1)
    head_dim, page_tokens = kv.layout.head_dim, kv.layout.page_tokens
    rotated = [
        _rotated(_heads(x[used], head_dim), weight, rotary.eps, *angles).to(x.dtype)
        for x, weight in ((q, rotary.q_norm), (k, rotary.k_norm))
    ]
    q[used] = rotated[0].flatten(1)
    planes = kv_planes(kv)
    page, token = place // page_tokens, place % page_tokens
    planes[page, 0, :, token] = rotated[1]
    planes[page, 1, :, token] = _heads(v[used], head_dim)


def kv_planes(kv: LayerKv) -> torch.Tensor:
    """A layer's part of every page: [pages, k|v, kv_heads, page_tokens, head_dim], a view."""
    layout = kv.layout
    pages = kv.arena.view(-1, layout.page_elements)
    first = kv.layer * layout.layer_elements
    part = pages[:, first : first + layout.layer_elements]
    return part.view(-1, 2, layout.kv_heads, layout.page_tokens, layout.head_dim)


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1] // head_dim, head_dim)


def _rotated(
    heads: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The heads [T, heads, head_dim], normalised if there is a weight, rotated, in float32."""
    values = heads.float()
    if weight is not None:
        _rms_norm(values, weight, eps, values)
    low, high = values.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
