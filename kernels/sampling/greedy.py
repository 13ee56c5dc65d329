"""The token of the largest logit, row by row."""

import torch

from granatum.kernels.backend import jit, overlap_options, require, runs_kernel, tl, triton
from granatum.kernels.sampling import reference
from granatum.kernels.sampling.logits import is_sound_order, load_logits, order_of, require_logits

_BLOCK = 4096
_LEAST = tl.constexpr(-(1 << 63))


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
    order = order_of(load_logits(logits + row * stride, n, V)).to(tl.int64)
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
        tl.store(sound + row, is_sound_order((best >> 32).to(tl.int32)).to(tl.int32))


def greedy_workspace_elements(rows: int, vocabulary: int) -> int:
    """Int64 elements of workspace that `greedy` needs."""
    return rows * -(-vocabulary // _BLOCK)


def greedy(
    logits: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    last: torch.Tensor,
    seats: torch.Tensor,
    sound: torch.Tensor | None = None,
) -> None:
    """out[t] = last[seats[t]] = the token of the largest logit, the lowest such token.

    logits [T, vocabulary], any float dtype; out, seats int [T]; last int [seats]. If rows share a
    seat, one of their tokens remains in it. workspace int64, `greedy_workspace_elements` at least.
    sound int [T], or None if nobody asks: 1 for a sound row, else 0.

    Raises:
        ValueError: a shape or stride that the op cannot take, or too small a workspace.
    """
    rows, vocabulary = require_logits(logits)
    if not runs_kernel(logits):
        reference.greedy(logits, out, sound)
        last[seats.long()] = out.to(last.dtype)
        return
    blocks = triton.cdiv(vocabulary, _BLOCK)
    fits = workspace.dtype == torch.int64 and workspace.numel() >= rows * blocks
    require(fits, f"the workspace must be {rows * blocks} int64 elements")
    _greedy_block_kernel[(rows, blocks)](
        logits, workspace, logits.stride(0), blocks, V=vocabulary, BLOCK=_BLOCK, num_warps=4,
        **overlap_options(logits),
    )  # fmt: skip
    _greedy_kernel[(rows,)](
        workspace, out, last, seats, sound, blocks, BLOCKS_POWER=triton.next_power_of_2(blocks),
        num_warps=1, **overlap_options(logits),
    )  # fmt: skip
