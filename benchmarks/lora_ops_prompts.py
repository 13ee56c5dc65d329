"""What adapters add to a fused linear of prompts' rows and the kernel that reads what it makes.

The kernel after qkv rotates and writes KV, that after gate and up activates; there LoRA is part of
that kernel, so that only both together tell what it costs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import lora_ops_cases as cases
import torch
from workload import SHAPES

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.layer import reference as reference_layer
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, RowPlaces, Tiles, make_tiles
from granatum.kernels.linear.dense import Dense
from granatum.kernels.lora import ops as lora

LAYERS = 4
TIMES = ("linear_us", "without_lora_us", "with_lora_us")
_PAGE_TOKENS = 16

Run = Callable[[], torch.Tensor]


def measure(part: cases.Linear, batch: cases.Batch, matrices: cases.Matrices) -> dict[str, float]:
    """Microseconds: of the linear, with its next kernel, and with adapters; checked first."""
    rig = Rig(part, batch, matrices)
    rig.check(matrices)
    lists = (
        [one(layer) for layer in range(LAYERS)] for one in (rig.alone, rig.bare, rig.with_lora)
    )
    times = cases.alternating_us(*lists)
    return dict(zip(TIMES, (round(us, 2) for us in times), strict=True))


class Rig:
    """A linear of a few layers, adapters for them, and what the kernel after it needs."""

    def __init__(self, part: cases.Linear, batch: cases.Batch, matrices: cases.Matrices) -> None:
        self._part, self._batch = part, batch
        shape, rows, used = SHAPES[part.model], batch.rows, batch.distinct * LAYERS
        packed = cases.pack_matrices(
            cases.Matrices(*(tuple(m[:used] for m in ms) for ms in (matrices.a, matrices.b)))
        )
        self._table = packed.table(part.group_index, batch.distinct, LAYERS)
        elements = LAYERS * 2 * shape.kv_heads * _PAGE_TOKENS * shape.head_dim
        self._kv = KvLayout(elements, _PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        before = -(-packed.arena.numel() // elements)  # pages that hold the adapters
        self._arena = packed.arena.new_empty(before + rows // _PAGE_TOKENS, elements)
        self._arena.view(-1)[: packed.arena.numel()] = packed.arena.flatten()
        device = self._arena.device
        positions = torch.arange(rows, dtype=torch.int32, device=device)
        self._places = RowPlaces(positions, positions + before * _PAGE_TOKENS)
        angles = torch.rand(rows, shape.head_dim // 2, device=device)
        self._rotary = Rotary(angles.cos(), angles.sin())
        self._x, y = cases.activations(part, batch)
        self._inner = y.new_empty(rows, y.shape[1] // 2)
        tiles = Tiles.allocate(rows, lora.PREFILL_BLOCK_M, device)
        tiles.fill(make_tiles(batch.adapters, lora.PREFILL_BLOCK_M, base=True))
        sizes = (part.in_features, part.out_features, lora.PREFILL_BLOCK_M, self._table.max_rank)
        elements = lora.workspace_elements(rows, *sizes, device)
        self._rows = LoraRows(tiles, torch.empty(elements, device=device))
        self._linears = [
            Dense(
                torch.randn(y.shape[1], part.in_features, dtype=y.dtype, device=device)
                * part.in_features**-0.5
            )
            for _ in range(LAYERS)
        ]

    def alone(self, layer: int) -> Run:
        """The linear."""
        return partial(self._linears[layer].apply, self._x)

    def _kv_of(self, layer: int) -> LayerKv:
        return LayerKv(self._arena, self._kv, layer)

    def bare(self, layer: int) -> Run:
        """The linear and what follows; its result is y rotated, activated or as it is."""

        def run() -> torch.Tensor:
            y = self._linears[layer].apply(self._x)
            if self._part.group == "gate_up":
                silu_mul(y, self._inner)
                return self._inner
            if self._part.group == "qkv":
                q, k, v = torch.split(y, list(self._part.out_features), dim=1)
                rope_and_write_kv(q, k, v, self._rotary, self._kv_of(layer), self._places)
            return y

        return run

    def with_lora(self, layer: int) -> Run:
        """The same with adapters."""

        part, linear = self._part, self._linears[layer]
        widths = (part.in_features, part.out_features)
        adapters = GroupAdapters(self._arena, self._table, layer, part.group_index, *widths)
        call = (adapters, self._rows)

        def run() -> torch.Tensor:
            x = self._x
            if part.group == "gate_up":
                lora.silu_mul_with_lora(linear.apply(x), x, self._inner, *call)
                return self._inner
            if part.group == "qkv":
                y, kv = linear.apply(x), self._kv_of(layer)
                lora.rope_with_lora(y, x, self._rotary, kv, self._places, *call)
                return y
            return lora.linear_with_lora(linear, x, *call)

        return run

    def check(self, matrices: cases.Matrices) -> None:
        """Compare both with float32; of q, k and v, q and what is in the pages."""
        y = self._x.float() @ self._linears[0].weight.float().T
        runs = (self.bare(0), self.with_lora(0))
        truths = (y, cases.truth(self._batch, matrices, self._x, y.clone()))
        for run, truth in zip(runs, truths, strict=True):
            for found, expected in zip(self._found(run()), self._expected(truth), strict=True):
                torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=3e-2)

    def _found(self, made: torch.Tensor) -> Iterator[torch.Tensor]:
        if self._part.group != "qkv":
            yield made
            return
        yield made[:, : self._part.out_features[0]]
        yield reference_layer.kv_planes(self._kv_of(0))[self._first_page :]

    def _expected(self, y: torch.Tensor) -> Iterator[torch.Tensor]:
        if self._part.group == "gate_up":
            out = y.new_empty(y.shape[0], y.shape[1] // 2)
            reference_layer.silu_mul(y, out)
            yield out
        elif self._part.group == "qkv":
            q, k, v = torch.split(y.clone(), list(self._part.out_features), dim=1)
            pages = y.new_empty(self._arena.shape)
            to = LayerKv(pages, self._kv, 0)
            reference_layer.rope_and_write_kv(q, k, v, self._rotary, to, self._places)
            yield q
            yield reference_layer.kv_planes(to)[self._first_page :]
        else:
            yield y

    @property
    def _first_page(self) -> int:
        return int(self._places.kv_slots[0]) // _PAGE_TOKENS
