"""SGMV: what each row's own adapter adds to a fused linear; mixed adapters and ranks, one launch.

    y[t, slice p] += scale_p * (x[t] @ A_p^T) @ B_p^T   of t's adapter A_p [r_p, K], B_p [N_p, r_p]

There are two steps. **Shrink** multiplies x with the group's stacked A, in chunks of K, and writes
the partial sums to a float32 workspace [chunks, T, projections * max_rank]. **Expand** adds the
partial sums in order, multiplies with B and adds to y. One grid serves every adapter, rank and row
count that fits its tile list: blocks loop over the true ranks, and spare blocks leave. There are no
atomics. A row's result depends on its own adapter, on shapes, on `block_m` and on the table's
largest rank.

Tiles of fewer than 16 rows are multiplied in registers, because memory bounds such work; longer
tiles are multiplied on the tensor cores. The two sum in different orders, so they may differ in the
last bits.

`add_lora` adds to what a linear made. Where rows are many, `linear_with_lora` reverses the order:
adapters write y, then the linear adds to y. Reading y hides behind the linear's arithmetic, so a y
too large for L2 travels once less. `silu_mul_with_lora` and `rope_with_lora` do not change y. The
kernel that reads y next adds what the adapters add, in its registers: y travels as it does without
adapters, and a launch is saved.
"""

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.backend import require, runs_kernel
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces
from granatum.kernels.linear.contract import Linear
from granatum.kernels.lora import reference
from granatum.kernels.lora.expand import expand, expand_from
from granatum.kernels.lora.expand_rope import expand_rope_and_write_kv
from granatum.kernels.lora.expand_silu import expand_silu_mul
from granatum.kernels.lora.shrink import shrink
from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M, Shape, config_for

MANY_ROWS = 1024
"""From this many rows on, `linear_with_lora` lets the linear add to y: it was measured to be
faster."""

__all__ = [
    "DECODE_BLOCK_M",
    "MANY_ROWS",
    "PREFILL_BLOCK_M",
    "add_lora",
    "expand",
    "expand_from",
    "linear_with_lora",
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
    """Float32 elements of workspace that a group needs for `rows` rows; its layers share them."""
    shape = Shape(in_features, out_features, max_rank, block_m)
    return config_for(shape, torch.device(device)).workspace_elements(shape, rows)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: GroupAdapters,
    rows: LoraRows,
    *,
    beside_linear: bool = False,
) -> None:
    """Add to y, in place, what each tile's adapter makes of x: `shrink`, then `expand`.

    y: [T, N], any float dtype; x: [T, K] of the arena's dtype; both with adjacent elements in a
    row. Rows in no tile stay as they are.
    beside_linear: the previous launch made y from this x, and `Linear.may_overlap` allows the
    shrink to start beside it.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    if not runs_kernel(x):
        reference.add_lora(y, x, adapters, rows)
        return
    shrink(x, adapters, rows, beside_linear=beside_linear)
    expand(y, adapters, rows)


def linear_with_lora(
    linear: Linear, x: torch.Tensor, adapters: GroupAdapters, rows: LoraRows
) -> torch.Tensor:
    """x W^T + b, and what each tile's adapter makes of x; [T, N], new.

    As `add_lora`. Tiles have at least `DOT_ROWS` rows. Tiles of slot -1 hold rows without an
    adapter. Rows in no tile are undefined.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    if x.shape[0] < MANY_ROWS or not runs_kernel(x):
        y = linear.apply(x)
        add_lora(y, x, adapters, rows)
        return y
    y = x.new_empty(x.shape[0], sum(adapters.out_features))
    shrink(x, adapters, rows)
    expand_from(linear.bias, y, adapters, rows)
    linear.apply_onto(y, x)
    return y


def silu_mul_with_lora(
    gate_up: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    adapters: GroupAdapters,
    rows: LoraRows,
    *,
    beside_linear: bool = False,
) -> None:
    """out = silu(gate + g) * (up + u) of tiles' rows, where g and u are what adapters make of x.

    gate_up [T, 2 N]: the linear's, of x [T, K]; it may change. out [T, N]. Tiles of slot -1 hold
    rows without an adapter; rows in no tile are undefined. The rest as in `add_lora`.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    n = out.shape[1]
    require(adapters.out_features == (n, n), f"out is {n} wide, gate and up are not")
    shrink(x, adapters, rows, beside_linear=beside_linear)
    if not expand_silu_mul(gate_up, out, adapters, rows):
        expand(gate_up, adapters, rows)
        silu_mul(gate_up, out)


def rope_with_lora(
    qkv: torch.Tensor,
    x: torch.Tensor,
    rotary: Rotary,
    kv: LayerKv,
    places: RowPlaces,
    adapters: GroupAdapters,
    rows: LoraRows,
) -> None:
    """Add to q, k and v what adapters make of x, then rotate and write as `rope_and_write_kv` does.

    qkv [T, (heads + 2 kv_heads) head_dim]: the linear's, of x [T, K]; q is rotated in place, k and
    v may change. Tiles as `linear_with_lora` takes them; rows in no tile are left alone.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    narrow = kv.layout.kv_heads * kv.layout.head_dim
    require(adapters.out_features[1:] == (narrow, narrow), "the group must be q, k and v")
    require(adapters.arena.data_ptr() == kv.arena.data_ptr(), "adapters and KV share an arena")
    rotary.require(kv.layout.head_dim)
    places.require(x.shape[0])
    shrink(x, adapters, rows)
    if not expand_rope_and_write_kv(qkv, rotary, kv, places, adapters, rows):
        expand(qkv, adapters, rows)
        q, k, v = torch.split(qkv, list(adapters.out_features), dim=1)
        rope_and_write_kv(q, k, v, rotary, kv, places)
