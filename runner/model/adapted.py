"""A fused linear with what a step's adapters add: which op serves which rows.

A step's rows come in two lists of tiles (docs/architecture.md, "A step"). Short tiles are of the
first rows, long tiles cover all rows; a step may lack either list.
"""

from dataclasses import dataclass

import torch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces
from granatum.kernels.linear.contract import Linear
from granatum.kernels.lora.ops import (
    add_lora,
    linear_with_lora,
    rope_with_lora,
    silu_mul_with_lora,
)
from granatum.runner.model.inputs import Step


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """A step's lists of tiles; None where the step lacks the list."""

    short: LoraRows | None
    long: LoraRows | None

    @classmethod
    def of(cls, step: Step, partials: torch.Tensor) -> "AdaptedRows":
        """The lists of a step. All ops share `partials`, room for the largest one's sums."""
        short, long = (
            LoraRows(tiles, partials) if tiles.capacity else None
            for tiles in (step.short_tiles, step.long_tiles)
        )
        return cls(short, long)


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """A fused linear of the base model, and the adapters of its group."""

    base: Linear
    adapters: GroupAdapters

    def apply(self, x: torch.Tensor, rows: AdaptedRows) -> torch.Tensor:
        """The linear of x [T, K] with what each row's adapter adds, [T, N]."""
        if rows.long is None:
            y = self.base.apply(x)
        else:
            y = linear_with_lora(self.base, x, self.adapters, rows.long)
        self._add_short(y, x, rows)
        return y

    def apply_short(self, x: torch.Tensor, rows: AdaptedRows) -> torch.Tensor:
        """As `apply`, without what adapters of long tiles add."""
        y = self.base.apply(x)
        self._add_short(y, x, rows)
        return y

    def rotate_long(
        self,
        qkv: torch.Tensor,
        x: torch.Tensor,
        rotary: Rotary,
        kv: LayerKv,
        places: RowPlaces,
        rows: AdaptedRows,
    ) -> None:
        """Add what adapters of long tiles make of x to `apply_short`'s qkv; rotate and write KV."""
        if rows.long is not None:
            rope_with_lora(qkv, x, rotary, kv, places, self.adapters, rows.long)
        else:
            q, k, v = torch.split(qkv, list(self.adapters.out_features), dim=1)
            rope_and_write_kv(q, k, v, rotary, kv, places)

    def activate(self, x: torch.Tensor, rows: AdaptedRows) -> torch.Tensor:
        """silu(gate) * up of the linear of x with what each row's adapter adds, [T, N / 2]."""
        gate_up = self.base.apply(x)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        if rows.long is not None:
            silu_mul_with_lora(gate_up, x, out, self.adapters, rows.long)
        if rows.short is not None:
            n = rows.short.tiles.capacity
            silu_mul_with_lora(
                gate_up[:n], x[:n], out[:n], self.adapters, rows.short,
                beside_linear=self._overlaps(x, rows),
            )  # fmt: skip
        if rows.short is None and rows.long is None:
            silu_mul(gate_up, out)
        return out

    def _add_short(self, y: torch.Tensor, x: torch.Tensor, rows: AdaptedRows) -> None:
        """Add to y what adapters of short tiles make of x, right after the linear."""
        if rows.short is not None:
            n = rows.short.tiles.capacity  # one tile for each of the first rows
            beside = self._overlaps(x, rows)
            add_lora(y[:n], x[:n], self.adapters, rows.short, beside_linear=beside)

    def _overlaps(self, x: torch.Tensor, rows: AdaptedRows) -> bool:
        """Whether the kernel launched just before short tiles' shrink is the linear of this x."""
        return rows.long is None and self.base.may_overlap(x.shape[0])
