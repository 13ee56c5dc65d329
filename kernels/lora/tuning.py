"""Which configuration of the LoRA kernels serves a shape: as it was measured, or the default.

A configuration depends on shapes and on the table's largest rank, never on a batch's content, so
that a row's result does not depend on its company.
"""

from dataclasses import dataclass, replace
from typing import get_type_hints

import torch

from granatum.kernels.backend import require
from granatum.kernels.device import Gpu, gpu_of
from granatum.kernels.tables import tables

OP = "lora"
"""The op's name among the tables."""

DECODE_BLOCK_M = 2
"""Rows per tile of a decode step: below `DOT_ROWS`, operands stay in registers."""
PREFILL_BLOCK_M = 64
"""Rows per tile of prefill chunks, multiplied on the tensor cores."""
DOT_ROWS = 16
"""From this many rows per tile on, the tensor cores are used."""


@dataclass(frozen=True, slots=True)
class Config:
    """How a shrink and its expand are cut into blocks.

    chunk_k:       input features of one partial sum; the expand adds the partials in order;
    shrink_k:      input features that a shrink block holds at a time;
    shrink_r:      stacked ranks that it holds at a time; 16 in `shrink_fragments`;
    rank_blocks:   blocks that share a tile's stacked ranks, each going through its part;
    expand_n:      output features that a block holds at a time; 128 in `expand_fragments`;
    expand_span:   output features that it goes through at most (row by row: those it holds);
    expand_r:      ranks that an expand block holds at a time; 16 in `expand_fragments`;
    silu_n:        columns of gate, and of up, of a block within the activation;
    pdl:           start while the previous kernel ends (programmatic dependent launch).
    """

    chunk_k: int
    shrink_k: int
    shrink_r: int
    rank_blocks: int
    shrink_warps: int
    shrink_stages: int
    expand_n: int
    expand_span: int
    expand_r: int
    expand_warps: int
    silu_n: int
    pdl: bool

    def chunks(self, shape: "Shape") -> int:
        """Partial sums of each value of the intermediate."""
        return -(-shape.in_features // self.chunk_k)

    def workspace_elements(self, shape: "Shape", rows: int) -> int:
        """Float32 elements of all partial sums of `rows` rows."""
        return self.chunks(shape) * rows * len(shape.out_features) * shape.max_rank

    def require_workspace(self, workspace: torch.Tensor, shape: "Shape", rows: int) -> None:
        """Refuse a workspace that is too small, not float32 or not contiguous.

        Raises:
            ValueError: naming what is needed.
        """
        needed = self.workspace_elements(shape, rows)
        fits = workspace.dtype == torch.float32 and workspace.is_contiguous()
        message = f"the workspace must be {needed} contiguous float32 elements"
        require(fits and workspace.numel() >= needed, f"{message}, not {workspace.numel()}")

    @property
    def launch_options(self) -> dict[str, bool]:
        """Options of a launch beyond warps and stages."""
        return {"launch_pdl": True} if self.pdl else {}


FIELDS = tables.OpFields(get_type_hints(Config))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a configuration may depend on."""

    in_features: int
    out_features: tuple[int, ...]
    max_rank: int
    block_m: int

    @property
    def dot(self) -> bool:
        """Whether tiles are long enough for the tensor cores."""
        return self.block_m >= DOT_ROWS

    @property
    def key(self) -> str:
        """The shape's name in a table, where the largest rank is the size.

        Only bfloat16 was measured. The other types, of which float32 serves tests alone, take the
        configurations that were measured for bfloat16.
        """
        outs = "+".join(str(n) for n in self.out_features)
        return f"{self.in_features}->{outs} bf16 by {'tiles' if self.dot else 'rows'}"


def default_config(shape: Shape, *, pdl: bool = False) -> Config:
    """What serves where nothing was measured; correct everywhere."""
    projections = len(shape.out_features)
    if shape.dot:
        return Config(
            chunk_k=2048 if shape.in_features > 8192 else 1024,
            shrink_k=64,
            shrink_r=16 if projections == 1 else 32,
            rank_blocks=1,
            shrink_warps=4,
            shrink_stages=3,
            expand_n=64,
            expand_span=1024,
            expand_r=16,
            expand_warps=4,
            silu_n=256,
            pdl=pdl,
        )
    return Config(
        chunk_k=512,
        shrink_k=512,
        shrink_r=16,
        rank_blocks=projections,
        shrink_warps=1,
        shrink_stages=1,
        expand_n=256,
        expand_span=256,
        expand_r=16,
        expand_warps=1,
        silu_n=128,
        pdl=pdl,
    )


def config_for(shape: Shape, device: torch.device) -> Config:
    """What serves a shape on a device."""
    return measured(gpu_of(device), shape)


@tables.remembered
def measured(gpu: Gpu, shape: Shape) -> Config:
    """What was measured on a GPU at the nearest rank; the default where nothing was measured."""
    default = default_config(shape, pdl=gpu.overlaps)
    return replace(default, **(tables.find(gpu, OP, shape.key, shape.max_rank) or {}))


def power_of_two(n: int) -> int:
    """The least power of two from n on."""
    return 1 << (n - 1).bit_length()
