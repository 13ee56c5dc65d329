"""Which configuration of the LoRA kernels serves a shape: measured on a GPU, or a default.

`h200.json` is the measured table, written by `benchmarks/lora_ops_tune.py`; it serves the H100 as
well, the same chip with slower memory. A configuration depends on shapes and on the table's largest
rank, never on a batch's content, so that a row's result does not depend on its company.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from granatum.kernels.backend import require

DECODE_BLOCK_M = 2
"""Rows per tile of a decode step: below `DOT_ROWS`, operands stay in registers."""
PREFILL_BLOCK_M = 64
"""Rows per tile of prefill chunks, multiplied on the tensor cores."""
DOT_ROWS = 16
"""The least rows per tile whose operands go through shared memory, to the tensor cores."""

_TABLES = {"H200": "h200.json", "H100": "h200.json"}


@dataclass(frozen=True, slots=True)
class Config:
    """How a shrink and its expand are cut into blocks.

    chunk_k:       input features of one partial sum; the expand adds the partials in order;
    shrink_k:      input features that a shrink block holds at a time;
    shrink_r:      stacked ranks that it holds at a time; 16 in `shrink_fragments`;
    rank_blocks:   blocks that share a tile's stacked ranks, each going through its part;
    expand_n:      output features that a block holds at a time; 128 in `expand_fragments`;
    expand_span:   output features that it goes through at most (row by row: those it holds);
    expand_r:      ranks that an expand block holds at a time; 16 there;
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
        """The shape's name in a measured table, without its rank."""
        outs = "+".join(str(n) for n in self.out_features)
        return f"{self.in_features}->{outs} by {'tiles' if self.dot else 'rows'}"


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
    """What was measured at the nearest rank, from `shape.max_rank` up if any; else the default."""
    if device.type != "cuda":
        return default_config(shape)
    return _measured(_table_name(device.index or 0), shape) or _default(device.index or 0, shape)


@cache
def _default(device_index: int, shape: Shape) -> Config:
    pdl = torch.cuda.get_device_capability(device_index) >= (9, 0)
    return default_config(shape, pdl=pdl)


@cache
def _measured(table: str | None, shape: Shape) -> Config | None:
    by_rank = _table(table).get(shape.key, {}) if table else {}
    ranks = sorted(int(rank) for rank in by_rank)
    if not ranks:
        return None
    nearest = next((rank for rank in ranks if rank >= shape.max_rank), ranks[-1])
    return Config(**by_rank[str(nearest)])


@cache
def _table(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    path = Path(__file__).parents[1] / "tables" / name
    configs: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())["configs"]
    return configs


@cache
def _table_name(device_index: int) -> str | None:
    gpu = torch.cuda.get_device_name(device_index)
    return next((table for name, table in _TABLES.items() if name in gpu), None)


def power_of_two(n: int) -> int:
    """The least power of two from n on."""
    return 1 << (n - 1).bit_length()
