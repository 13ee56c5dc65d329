"""SGMV: what each row's own adapter adds to a fused linear; mixed adapters and ranks, one launch.

    y[t, slice p] += scale_p * (x[t] @ A_p^T) @ B_p^T   of t's adapter A_p [r_p, K], B_p [N_p, r_p]

In two steps. **Shrink** multiplies x with the group's stacked A, in chunks of K whose partial sums
go to a float32 workspace [chunks, T, projections * max_rank]; **expand** adds the partials in
order, multiplies with B and adds to y. One grid serves every adapter, rank and row count that fits
its tile list: blocks loop over the true ranks, and spare ones leave. There are no atomics; a row's
result depends on its own adapter, on shapes and on `block_m` alone.

Tiles of fewer than 16 rows are multiplied from registers, as memory-bound work wants; longer tiles
on the tensor cores. The two sum in different orders, and may differ in the last bits.

`add_lora` adds to what a linear made. `linear_with_lora` goes the other way round where rows are
many: y is made of what the adapters add, and the linear, which computes long enough to hide that
it reads y, adds to it. So y travels once less, where it is too large for the L2 cache.
`silu_mul_with_lora` and `rope_with_lora` add nothing to y at all, but to what the kernel that reads
y next has in its registers: y then travels as it does without adapters, and a launch is saved.
"""

import torch
from torch.nn import functional

from granatum.kernels.backend import runs_kernel
from granatum.kernels.layer.rope import Rotary
from granatum.kernels.layout import AdapterTable, KvLayout, Tiles, make_tiles
from granatum.kernels.lora import reference
from granatum.kernels.lora.expand import expand, expand_from
from granatum.kernels.lora.expand_rope import QKV, expand_rope_and_write_kv
from granatum.kernels.lora.expand_silu import GATE_UP, expand_silu_mul
from granatum.kernels.lora.shrink import shrink
from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M, Shape, config_for

MANY_ROWS = 1024
"""From which on `linear_with_lora` does so: it was measured to be faster."""

__all__ = [
    "DECODE_BLOCK_M",
    "MANY_ROWS",
    "PREFILL_BLOCK_M",
    "AdapterTable",
    "Tiles",
    "add_lora",
    "expand",
    "expand_from",
    "linear_with_lora",
    "make_tiles",
    "rope_with_lora",
    "shrink",
    "silu_mul_with_lora",
    "workspace_elements",
]


def workspace_elements(
    rows: int,
    in_features: int,
    out_features: tuple[int, ...],
    block_m: int,
    max_rank: int,
    device: torch.device | str,
) -> int:
    """Float32 elements of workspace that a group needs for `rows` rows; at most, of its layers."""
    shape = Shape(in_features, out_features, max_rank, block_m)
    return config_for(shape, torch.device(device)).workspace_elements(shape, rows)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
    workspace: torch.Tensor,
    *,
    beside_linear: bool = False,
) -> None:
    """Add to y, in place, what each tile's adapter makes of x: `shrink`, then `expand`.

    y: [T, sum(out_features)], any float dtype; x: [T, K] of the arena's dtype; both with adjacent
    elements in a row. arena: contiguous, at least 16-byte aligned. group: 0 qkv, 1 o, 2 gate_up,
    3 down. workspace: float32, `workspace_elements` at least. Rows in no tile stay as they are.
    beside_linear: the launch before this one was `linear`'s own kernel, of this x into y; the
    shrink then runs beside it, since it needs x alone.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    if not runs_kernel(x):
        reference.add_lora(y, x, arena, table, layer, group, out_features, tiles)
        return
    shrink(
        x, arena, table, layer, group, out_features, tiles, workspace, beside_linear=beside_linear
    )
    expand(y, x.shape[1], arena, table, layer, group, out_features, tiles, workspace)


def linear_with_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    group: int,
    out_features: tuple[int, ...],
    tiles: Tiles,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """x W^T + b, and what each tile's adapter makes of x; [T, N], new.

    weight [N, K], bias [N]; the rest as in `add_lora`. Tiles are of `DOT_ROWS` at least, and those
    of slot -1 hold the rows without an adapter: rows in no tile are undefined.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    adapters = (arena, table, layer, group, out_features, tiles, workspace)
    if x.shape[0] < MANY_ROWS or not runs_kernel(x):
        y = functional.linear(x, weight, bias)
        add_lora(y, x, *adapters)
        return y
    y = x.new_empty(x.shape[0], weight.shape[0])
    shrink(x, *adapters)
    expand_from(bias, y, x.shape[1], *adapters)
    return torch.addmm(y, x, weight.t(), out=y)


def silu_mul_with_lora(
    gate_up: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    tiles: Tiles,
    workspace: torch.Tensor,
    *,
    beside_linear: bool = False,
) -> None:
    """out = silu(gate + g) * (up + u) of tiles' rows, where g and u are what adapters make of x.

    gate_up [T, 2 N]: the linear's, of x [T, K]; it stays as it is. out [T, N]. Tiles of slot -1
    hold rows without an adapter; rows in no tile are not written. The rest as in `add_lora`.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    outs = (out.shape[1], out.shape[1])
    shrink(x, arena, table, layer, GATE_UP, outs, tiles, workspace, beside_linear=beside_linear)
    expand_silu_mul(gate_up, out, x.shape[1], arena, table, layer, tiles, workspace)


def rope_with_lora(
    qkv: torch.Tensor,
    x: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    kv: KvLayout,
    kv_slots: torch.Tensor,
    arena: torch.Tensor,
    table: AdapterTable,
    layer: int,
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """Add to q, k and v what adapters make of x, then rotate and write as `rope_and_write_kv` does.

    qkv [T, (heads + 2 kv_heads) head_dim]: the linear's, of x [T, K]; q is rotated in place, k and
    v stay as they are. Tiles as `linear_with_lora` takes them; rows in no tile are left alone.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    narrow = kv.kv_heads * kv.head_dim
    outs = (qkv.shape[1] - 2 * narrow, narrow, narrow)
    shrink(x, arena, table, layer, QKV, outs, tiles, workspace)
    expand_rope_and_write_kv(
        qkv, x.shape[1], positions, rotary, kv, kv_slots, arena, table, layer, tiles, workspace
    )
