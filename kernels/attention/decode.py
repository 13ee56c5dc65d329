"""Flash decoding over the arena's pages; it also rotates its rows' queries and keys and writes KV.

A row's tokens are cut into pieces; the cut depends on shapes and on the row's own length alone.
Blocks take pieces. The block that ends a row's last piece adds up the row's pieces.
"""

from dataclasses import dataclass
from typing import Any

import torch

from granatum.kernels.attention import decode_fragments, decode_general, reference
from granatum.kernels.attention.common import LOG2_E, require_queries
from granatum.kernels.backend import overlap_options, require, require_rows, runs_kernel, triton
from granatum.kernels.device import gpu_of
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv

MAX_PIECES = 16
"""The most pieces of a row."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode attention is cut into blocks.

    block_t: tokens that a block takes at a time, in a dtype of 16 bits; with 32 bits, half as many;
    stages:  how many steps ahead loads go through shared memory;
    blocks:  blocks that keep the GPU's memory busy;
    piece:   tokens of a piece, where rows times kv heads are 1024 or more.
    """

    block_t: int
    stages: int
    blocks: int
    piece: int


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Room for the results of pieces.

    partials: float32, a piece's maximum, sum and unnormalised values for each head;
    arrivals: int32 [rows * kv_heads], pieces that are done; zero between launches;
    turns:    int32 [2], pieces that blocks have taken and blocks that have ended; zero between
              launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor
    turns: torch.Tensor


def piece_tokens(config: DecodeConfig, rows: int, kv: KvLayout) -> int:
    """Tokens of a piece, from shapes alone. With fewer rows, pieces are shorter."""
    share = min(rows * kv.kv_heads, 1024) * config.piece // 1024
    return max(-(-share // config.block_t), 2) * config.block_t


def most_pieces(config: DecodeConfig, rows: int, kv: KvLayout, max_tokens: int) -> int:
    """Pieces of a row of `max_tokens` tokens."""
    return min(-(-max_tokens // piece_tokens(config, rows, kv)), MAX_PIECES)


def decode_config(heads: int, kv: KvLayout, sms: int) -> DecodeConfig:
    """What was measured to be best on an H200, with blocks for a GPU of `sms` multiprocessors."""
    if heads == kv.kv_heads:  # no key is shared among query heads
        return DecodeConfig(16, 2, 16 * sms, 512)
    return DecodeConfig(32, 3, 8 * sms, 1024)


def allocate_decode_workspace(
    max_rows: int,
    heads: int,
    kv: KvLayout,
    max_tokens: int,
    device: torch.device,
    config: DecodeConfig | None = None,
) -> DecodeWorkspace:
    """Room for up to `max_rows` rows; their page tables hold `max_tokens` tokens each."""
    config = config or decode_config(heads, kv, gpu_of(device).sms)
    pieces = max(
        rows * most_pieces(config, rows, kv, max_tokens) for rows in range(1, max_rows + 1)
    )
    return DecodeWorkspace(
        torch.empty(pieces * heads * (kv.head_dim + 2), dtype=torch.float32, device=device),
        torch.zeros(max_rows * kv.kv_heads, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: Rotary,
    kv: LayerKv,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Attention of one row per sequence over its `lengths` tokens; the row's own token is the last.

    q and k are rotated to that position first, as `rope.rope_and_write_kv` does, but stay as they
    are; the rotated k, and v, are written to the arena.

    q [T, heads * head_dim], k, v [T, kv_heads * head_dim], out as q; rows evenly apart (views of
    the fused projections). page_table int32 [T, pages of the longest sequence]; entries past a
    sequence's end are not read. lengths int32 [T]; 0: a padding row, whose output is 0. workspace
    for T rows of `page_table.shape[1] * page_tokens` tokens at least.

    Raises:
        ValueError: a shape or stride that the op cannot take.
    """
    layout = kv.layout
    rows, heads = require_queries(q, out, layout)
    for name, tensor in (("k", k), ("v", v)):
        require_rows(name, tensor, (rows, layout.kv_heads * layout.head_dim))
    rotary.require(layout.head_dim)
    require(lengths.shape == (rows,), f"lengths must be [{rows}]")
    require_rows("page_table", page_table, (rows, page_table.shape[1]))
    if not runs_kernel(q):
        reference.decode_attention(q, k, v, rotary, kv, page_table, lengths, scale, out)
        return
    config = decode_config(heads, layout, gpu_of(q.device).sms)
    launch_decode(q, k, v, rotary, kv, page_table, lengths, scale, out, workspace, config)


def launch_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary, kv: LayerKv,
    page_table: torch.Tensor, lengths: torch.Tensor, scale: float, out: torch.Tensor,
    workspace: DecodeWorkspace, config: DecodeConfig,
) -> None:  # fmt: skip
    """The kernel in one configuration; the arguments were checked."""
    layout = kv.layout
    d, kv_heads, (rows, width) = layout.head_dim, layout.kv_heads, q.shape
    heads = width // d
    pieces = most_pieces(config, rows, layout, page_table.shape[1] * layout.page_tokens)
    enough = workspace.partials.numel() >= rows * pieces * heads * (d + 2)
    enough &= workspace.arrivals.numel() >= rows * kv_heads
    require(enough, f"the workspace must be for {rows} rows of {pieces} pieces")
    block_t = config.block_t * 2 // q.element_size()
    kernel, options = _kernel_for(q, heads // kv_heads, d, block_t, config.stages)
    kernel[(min(config.blocks, rows * kv_heads * pieces),)](
        q, k, v, rotary.cos, rotary.sin, rotary.q_norm, rotary.k_norm, kv.arena, page_table,
        lengths, out, workspace.partials, workspace.arrivals, workspace.turns,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), page_table.stride(0),
        layout.page_elements, rows, pieces, piece_tokens(config, rows, layout), kv.layer,
        scale * LOG2_E, rotary.eps,
        HEADS=heads, KV_HEADS=kv_heads, PAGE_TOKENS=layout.page_tokens, D=d, BLOCK_T=block_t,
        BLOCK_ROWS=max(32, triton.next_power_of_2(rows)),  # not every batch size is compiled
        JOINED_HEADS=triton.next_power_of_2(heads // kv_heads), **options, **overlap_options(q),
    )  # fmt: skip


def _kernel_for(
    q: torch.Tensor, group: int, head_dim: int, block_t: int, stages: int
) -> tuple[Any, dict[str, Any]]:
    """The kernel for `group` query heads to a kv head, and the options that it alone has."""
    if decode_fragments.serves(q, head_dim, group):
        return decode_fragments.decode_kernel, decode_fragments.options(block_t)
    return decode_general.general_kernel, {
        "BLOCK_G": max(16, triton.next_power_of_2(group)) if group > 1 else 1,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "DOT": group > 1,
        "STAGES": stages,
        "num_warps": 4 if group > 1 else 1,
    }
