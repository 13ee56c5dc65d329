"""How a linear of few rows is cut into blocks: as it was measured, or not at all.

The default is the library. So a shape that was never measured goes to torch, and so does a shape
for which torch was faster.
"""

from dataclasses import dataclass
from typing import get_type_hints

import torch

from granatum.kernels.backend import runs_kernel
from granatum.kernels.device import Gpu, gpu_of
from granatum.kernels.tables import tables

OP = "linear"
"""The op's name among the tables."""
MAX_ROWS = 64
"""With more rows arithmetic counts as well, and the library serves."""
ROWS = (16, 32, MAX_ROWS)
"""Rows of a block that the kernel is compiled for; 16 is the least that the tensor cores take."""


@dataclass(frozen=True, slots=True)
class Config:
    """How a linear is cut into blocks.

    block_n, block_k: rows and columns of W in a tile;
    splits:           blocks that share K.
    """

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


FIELDS = tables.OpFields(get_type_hints(Config), frozenset(get_type_hints(Config)))


def block_rows(rows: int) -> int:
    """Rows of x, padding included, that a block takes."""
    return next(n for n in ROWS if n >= rows)


def config_for(rows: int, weight: torch.Tensor) -> Config | None:
    """How `rows` rows meet `weight` where the kernel was measured to be faster than the library."""
    on_gpu = weight.is_cuda and runs_kernel(weight)
    if rows > MAX_ROWS or not on_gpu or weight.dtype.itemsize != 2:
        return None
    out_features, in_features = weight.shape
    return measured(gpu_of(weight.device), in_features, out_features, rows)


@tables.remembered
def measured(gpu: Gpu, in_features: int, out_features: int, rows: int) -> Config | None:
    """The configuration of a 16-bit linear; None: the library serves."""
    found = tables.find(gpu, OP, shape_key(in_features, out_features), block_rows(rows))
    return None if found is None else Config(**found)


def shape_key(in_features: int, out_features: int) -> str:
    """A shape's name in a table. Both types of 16 bits move equal bytes: bfloat16 was measured."""
    return f"{in_features}->{out_features} bf16"
