"""A fused module in an image: each projection has a copy of A, and its own rows of B."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_adapters import BASE, HIDDEN, INNER, KV, Tensors

from granatum.adapters_store.format.peft_config import PeftConfig
from granatum.adapters_store.format.validate import validate
from granatum.adapters_store.limits import DEFAULT_LIMITS
from granatum.models.families import FAMILIES
from granatum.runner.adapters.images.file import read_image, write_image
from granatum.runner.adapters.images.image import AdapterImage, ImageShape, build_image
from granatum.runner.adapters.images.layout import lay_out
from granatum.v1.errors import InvalidAdapter

PHI = replace(BASE, family=FAMILIES["phi3"])
SHAPE = ImageShape(PHI, "float32", 1 << 13, max_rank=16)
PARTS = {
    "qkv_proj": {"q_proj": HIDDEN, "k_proj": KV, "v_proj": KV},
    "gate_up_proj": {"gate_proj": INNER, "up_proj": INNER},
}
RANKS = {"qkv_proj": 5, "gate_up_proj": 16}


def tensor_name(layer: int, module: str, matrix: str) -> str:
    return f"base_model.model.{PHI.module_name(layer, module)}.lora_{matrix}.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Tensors]:
    """PEFT's files of a random adapter of the fused modules, and its tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(PHI.num_layers):
        for module, rank in RANKS.items():
            outputs = sum(PARTS[module].values())
            a = torch.randn(rank, HIDDEN, generator=generator)
            b = torch.randn(outputs, rank, generator=generator)
            tensors[tensor_name(layer, module, "A")] = a
            tensors[tensor_name(layer, module, "B")] = b
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 8, "target_modules": list(RANKS)}
    config["rank_pattern"] = {"qkv_proj": 5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path, tensors


def deltas(image: AdapterImage, layer: int, module: str) -> torch.Tensor:
    """B A of a module's projections, one under another, read as kernels read an image."""
    flat = torch.from_numpy(image.pages.reshape(-1).copy())
    a, b = image.row.resolve(tuple(range(len(image.pages))), SHAPE.page_elements)
    names = PHI.family.projections
    group = next(i for i, g in enumerate(PHI.family.groups) if PHI.modules[module] in g.modules)
    found, row = [], 0
    for name, outputs in PARTS[module].items():
        index = names.index(name)
        rank = int(image.row.rank[layer, index])
        a_at, b_at = int(a[layer, group]) + row * HIDDEN, int(b[layer, index])
        down = flat[a_at : a_at + rank * HIDDEN].view(rank, HIDDEN)
        up = flat[b_at : b_at + rank * outputs].view(rank, outputs)
        found.append(up.T @ down)
        row += rank
    return torch.cat(found)


@pytest.mark.parametrize("module", PARTS)
def test_the_parts_together_add_what_the_fused_module_adds(
    module: str, adapter: tuple[Path, Tensors]
) -> None:
    folder, tensors = adapter
    image = build_image(folder, SHAPE)
    for layer in range(PHI.num_layers):
        a, b = (tensors[tensor_name(layer, module, matrix)] for matrix in ("A", "B"))
        torch.testing.assert_close(deltas(image, layer, module), b @ a)
    columns = [PHI.family.projections.index(name) for name in PARTS[module]]
    padded = -(-RANKS[module] // 8) * 8
    assert (image.row.rank[:, columns] == padded).all()
    assert np.allclose(image.row.scale[:, columns], 8 / RANKS[module])


def test_the_upload_counts_the_numbers_that_the_image_holds(
    adapter: tuple[Path, Tensors],
) -> None:
    files = adapter[0] / "adapter_config.json", adapter[0] / "adapter_model.safetensors"
    modules = PeftConfig.parse(files[0].read_bytes()).modules(PHI)
    places = lay_out(PHI, modules, SHAPE.page_elements).places
    held = sum(place.piece.rows * place.piece.columns for place in places)
    assert validate(*files, PHI, DEFAULT_LIMITS).elements == held


def test_its_file_is_read_back(adapter: tuple[Path, Tensors], tmp_path: Path) -> None:
    image, path = build_image(adapter[0], SHAPE), tmp_path / "image"
    write_image(path, "ab" * 32, SHAPE, image)
    pages = [memoryview(bytearray(SHAPE.page_bytes)) for _ in image.pages]
    row = read_image(path, "ab" * 32, SHAPE, pages)
    assert b"".join(pages) == image.pages.tobytes()
    assert np.array_equal(row.rank, image.row.rank)


def test_a_tensor_of_a_part_alone_is_refused(adapter: tuple[Path, Tensors]) -> None:
    folder, tensors = adapter
    name = tensor_name(1, "qkv_proj", "B")
    tensors[name] = tensors[name][:HIDDEN].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match=rf"{name} is of shape .* asks for \[128, 5\]"):
        build_image(folder, SHAPE)


def test_a_rank_above_the_runners_names_the_fused_module(adapter: tuple[Path, Tensors]) -> None:
    with pytest.raises(InvalidAdapter, match=r"rank 16 of model.layers.0.mlp.gate_up_proj"):
        build_image(adapter[0], replace(SHAPE, max_rank=8))
