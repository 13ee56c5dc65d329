"""The torch twins of attention: specification and CPU backend.

Arguments and effects are those of the launchers of the same names.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from granatum.kernels.layer.reference import kv_planes, rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces, Tiles


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary, kv: LayerKv,
    page_table: torch.Tensor, lengths: torch.Tensor, scale: float, out: torch.Tensor,
) -> None:  # fmt: skip
    """As `attention.decode_attention`, without pieces and so without their workspace."""
    positions, page_tokens = lengths.long() - 1, kv.layout.page_tokens
    pages = page_table[torch.arange(len(lengths), device=q.device), positions // page_tokens]
    slots = pages * page_tokens + positions % page_tokens
    slots = torch.where(positions < 0, -1, slots)
    q = q.clone()
    rope_and_write_kv(q, k, v, rotary, kv, RowPlaces(positions, slots))
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            out[row] = 0
        else:
            keys, values = _gather(kv, page_table[row], length)
            out[row : row + 1] = _attend(q[row : row + 1], keys, values, None, scale)


def prefill_attention(
    q: torch.Tensor, kv: LayerKv, page_table: torch.Tensor, tiles: Tiles, scale: float,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """As `attention.prefill_attention`."""
    for sequence, first, rows, position in tiles.entries[: int(tiles.count)].tolist():
        keys, values = _gather(kv, page_table[sequence], position + rows)
        at = position + torch.arange(rows, device=q.device)
        seen = torch.arange(position + rows, device=q.device)[None, :] <= at[:, None]
        mine = slice(first, first + rows)
        out[mine] = _attend(q[mine], keys, values, seen, scale)


def _gather(kv: LayerKv, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's keys and values, [kv_heads, length, head_dim] each."""
    used = pages[: -(-length // kv.layout.page_tokens)].long()
    tokens = kv_planes(kv)[used].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
    return tokens[0], tokens[1]


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Rows [rows, heads * head_dim] of attention in float32."""
    heads = q.reshape(q.shape[0], -1, keys.shape[2]).transpose(0, 1).float()
    group = heads.shape[0] // keys.shape[0]
    k, v = (x.float().repeat_interleave(group, dim=0) for x in (keys, values))
    attended = scaled_dot_product_attention(heads[None], k[None], v[None], seen, scale=scale)[0]
    return attended.transpose(0, 1).flatten(1).to(q.dtype)
