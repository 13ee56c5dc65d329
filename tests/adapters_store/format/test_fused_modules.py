"""Adapters of a family that fuses projections: PEFT's fused modules are checked as they are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from adapter_files import Shape, Tensor, Tensors, config, tensors, upload, weights
from uploading import BASE, chunks_of, header_of

from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.limits import RunnerLimits
from granatum.adapters_store.store import AdapterStore
from granatum.models.families import FAMILIES
from granatum.v1.errors import InvalidAdapter

PHI = replace(BASE, family=FAMILIES["phi3"])
WIDTHS = {"qkv_proj": (16, 32 + 8 + 8), "gate_up_proj": (16, 24 + 24)}
"""BASE has 16 hidden, 32 query and 8 key elements, and an MLP of 24."""
SHAPE = Shape(PHI.num_layers, {**PHI.features, **WIDTHS})
TARGETS = ("qkv_proj", "down_proj", "gate_up_proj", "o_proj")


async def sent(parts: Tensors, targets: Any = TARGETS, room: int = 0) -> Manifest:
    """The manifest of an upload of rank 4, where runners have room for `room` numbers."""
    store = AdapterStore.open("memory://", PHI)
    made = upload(config(4, targets), weights(parts))
    manifest, _ = await store.upload(
        "acme", header_of(made), chunks_of(made), (RunnerLimits(max_elements=room),)
    )
    return manifest


async def test_fused_modules_are_taken() -> None:
    manifest = await sent(tensors(SHAPE, 4, TARGETS))
    assert manifest.target_modules == tuple(sorted(TARGETS))


async def test_all_linear_is_every_fused_module() -> None:
    assert (await sent(tensors(SHAPE, 4, TARGETS), "all-linear")).max_rank == 4


async def test_every_part_of_a_fused_module_counts_with_a_copy_of_its_a() -> None:
    parts = tensors(SHAPE, 4, ("qkv_proj",))
    elements = PHI.num_layers * 8 * (3 * 16 + 32 + 8 + 8)
    await sent(parts, ("qkv_proj",), room=elements)
    with pytest.raises(InvalidAdapter, match=f"room for {elements:,} numbers"):
        await sent(parts, ("qkv_proj",), room=elements - 1)


@pytest.mark.parametrize(
    ("matrix", "shape", "message"),
    [
        ("A", (8, 16), r"\[8, 16\], not \[4, 16\]: .* rank 4"),
        ("A", (12, 16), r"\[12, 16\], not \[4, 16\]"),
        ("B", (32, 4), r"\[32, 4\], not \[48, 4\]: is the adapter for another"),
        ("B", (48, 12), r"\[48, 12\], not \[48, 4\]"),
    ],
)
@pytest.mark.parametrize("module", WIDTHS)
async def test_another_shape_is_refused(
    module: str, matrix: str, shape: tuple[int, int], message: str
) -> None:
    parts = tensors(SHAPE, 4, TARGETS)
    name = next(n for n in parts if f"1.{PHI.modules[module].path}.lora_{matrix}" in n)
    parts[name] = Tensor("F32", shape, np.zeros(shape, np.float32).tobytes())
    with pytest.raises(InvalidAdapter, match=f"{module}.lora_{matrix}.* has shape {message}"):
        await sent(parts)


async def test_parts_are_no_modules() -> None:
    with pytest.raises(InvalidAdapter, match=r"matches no module .*'qkv_proj'"):
        await sent(tensors(SHAPE, 4, ("q_proj",)), ("q_proj",))
    beside = {**tensors(SHAPE, 4, TARGETS), **tensors(SHAPE, 4, ("q_proj",))}
    with pytest.raises(InvalidAdapter, match="only qkv_proj, o_proj, gate_up_proj, down_proj can"):
        await sent(beside)


@pytest.mark.parametrize("matrix", ["A", "B"])
async def test_one_large_number_anywhere_is_refused(matrix: str) -> None:
    parts = tensors(SHAPE, 4, TARGETS)
    name = next(n for n in parts if f"0.self_attn.qkv_proj.lora_{matrix}" in n)
    numbers = np.frombuffer(parts[name].data, np.float32).copy()
    numbers[-1] = 1e38
    parts[name] = replace(parts[name], data=numbers.tobytes())
    with pytest.raises(InvalidAdapter, match=f"qkv_proj.lora_{matrix}.* holds"):
        await sent(parts)
