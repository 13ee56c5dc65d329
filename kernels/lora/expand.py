"""SGMV-expand: adds the partial sums of a shrink, multiplies with B and adds to y, or makes y."""

from typing import Any

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.backend import require, require_rows, runs_kernel
from granatum.kernels.device import gpu_of
from granatum.kernels.lora import expand_fragments as fragments
from granatum.kernels.lora import reference
from granatum.kernels.lora.cut import (
    blocks_across,
    cut_expand,
    expand_arguments,
    fewest_blocks,
    fitting_span,
    tile_programs,
)
from granatum.kernels.lora.expand_rows import expand_rows_kernel
from granatum.kernels.lora.expand_tiles import expand_tiles_kernel
from granatum.kernels.lora.tuning import Config, Shape, power_of_two


def expand(y: torch.Tensor, adapters: GroupAdapters, rows: LoraRows) -> None:
    """y[t, slice p] += scale_p * (sum of t's partials of p) @ B_p, after `shrink`.

    Arguments as in `ops.add_lora`.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    shape, config = cut_expand(y, adapters, rows)
    if not runs_kernel(y):
        reference.expand(y, adapters, rows)
        return
    launch_expand(y, adapters, rows, shape, config)


def expand_from(
    bias: torch.Tensor | None, y: torch.Tensor, adapters: GroupAdapters, rows: LoraRows
) -> None:
    """y[t, slice p] = bias[slice p] + scale_p * (sum of t's partials of p) @ B_p of tiles' rows t.

    As `expand`, but y is written. Rows of tiles without an adapter, and projections that an adapter
    leaves alone, become the bias [N], or 0 if there is none. Only for tiles long enough for the
    tensor cores.

    Raises:
        ValueError: a shape, stride or dtype that the op cannot take.
    """
    shape, config = cut_expand(y, adapters, rows)
    require(shape.dot, f"tiles of {shape.block_m} rows are too short")
    if bias is not None:
        require_rows("bias", bias, (y.shape[1],))
    if not runs_kernel(y):
        reference.expand_from(bias, y, adapters, rows)
        return
    launch_expand(y, adapters, rows, shape, config, add=False, bias=bias)


def launch_expand(
    y: torch.Tensor,
    adapters: GroupAdapters,
    rows: LoraRows,
    shape: Shape,
    config: Config,
    *,
    add: bool = True,
    bias: torch.Tensor | None = None,
) -> None:
    """The kernel in one configuration; its arguments were checked. Without `add` y is written."""
    kernel: Any = expand_rows_kernel
    outs = (*shape.out_features, 0, 0)[:3]
    made: tuple[torch.Tensor | None, ...] = ()
    span, across = config.expand_span, rows.tiles.capacity
    options: dict[str, Any] = {"BLOCK_N": config.expand_n, "BLOCK_R": config.expand_r}
    options |= {"num_warps": config.expand_warps}
    if shape.dot:
        made, across = (bias,), tile_programs(rows.tiles, y.shape[0])
        least, kernel = config.expand_n, expand_tiles_kernel
        options |= {"BLOCK_M": power_of_two(shape.block_m)}
        if fragments.serves(y, shape, fragments.PAIR):
            least, kernel = fragments.PAIR, fragments.expand_kernel
            options = fragments.options(shape.max_rank)
        span = fitting_span(span, least, outs, across, fewest_blocks(gpu_of(y.device)))
        options |= {"SPAN": span, "ADD": add}
    kernel[(blocks_across(outs, span), across)](
        y, *made, *expand_arguments(adapters, rows), y.stride(0), y.shape[0],
        len(shape.out_features) * shape.max_rank, adapters.table.layers, adapters.layer,
        PROJECTIONS=len(shape.out_features), N0=outs[0], N1=outs[1], N2=outs[2],
        CHUNKS=config.chunks(shape), PDL=config.pdl,
        num_stages=1,  # the compiler copies B ahead with more, and spills
        **adapters.constants, **options, **config.launch_options,
    )  # fmt: skip
