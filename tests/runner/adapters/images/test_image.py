"""What becomes of PEFT's files: the numbers torch would have, or a refusal that says why."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_adapters import BASE, Tensors

from granatum.models.families import LLAMA
from granatum.runner.adapters.images.image import AdapterImage, ImageShape, build_image
from granatum.v1.errors import InvalidAdapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shape_of(dtype: str = "float32", elements: int = 1 << 15, max_rank: int = 64) -> ImageShape:
    return ImageShape(BASE, dtype, elements, max_rank)


def tensor_name(layer: int, projection: str, matrix: str) -> str:
    return f"base_model.model.{BASE.module_name(layer, projection)}.lora_{matrix}.weight"


def adapter(directory: Path, rank: int, targets: tuple[str, ...], dtype: torch.dtype) -> Tensors:
    """PEFT's files of a random adapter."""
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(BASE.num_layers):
        for name in targets:
            inputs, outputs = BASE.features[name]
            a = torch.randn(rank, inputs, generator=generator) * 10 ** (layer * 1.5)
            b = torch.randn(outputs, rank, generator=generator) * 1e-6
            tensors[tensor_name(layer, name, "A")] = a.to(dtype)
            tensors[tensor_name(layer, name, "B")] = b.to(dtype)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    configure(directory, r=rank, target_modules=list(targets))
    return tensors


def configure(directory: Path, **fields: object) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 8, **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def numbers_of(image: AdapterImage, dtype: str, page: int, offset: int, count: int) -> torch.Tensor:
    raw = torch.from_numpy(image.pages[page, offset : offset + count].view(np.uint8).copy())
    return raw.view(DTYPES[dtype])


@pytest.mark.parametrize("filed", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_numbers_are_those_that_torch_rounds_to(
    tmp_path: Path, filed: torch.dtype, dtype: str
) -> None:
    tensors = adapter(tmp_path, 5, LLAMA.projections, filed)
    image = build_image(tmp_path, shape_of(dtype))
    for layer in range(BASE.num_layers):
        for index, name in enumerate(LLAMA.projections):
            b = tensors[tensor_name(layer, name, "B")].to(DTYPES[dtype])
            page, offset = image.row.b_page[layer, index], image.row.b_offset[layer, index]
            found = numbers_of(image, dtype, page, offset, 8 * b.shape[0]).view(8, -1)
            assert torch.equal(found[:5], b.T)
            assert not found[5:].any()
        a = tensors[tensor_name(layer, "down_proj", "A")].to(DTYPES[dtype])
        page, offset = image.row.a_page[layer, 3], image.row.a_offset[layer, 3]
        assert torch.equal(numbers_of(image, dtype, page, offset, 5 * a.shape[1]).view(5, -1), a)


@pytest.mark.parametrize("rank", [65, 128, 256])
def test_rank_above_the_runners_is_refused_by_name(tmp_path: Path, rank: int) -> None:
    adapter(tmp_path, rank, ("q_proj",), torch.float32)
    with pytest.raises(InvalidAdapter, match=f"rank {rank} of model.layers.0.self_attn.q_proj"):
        build_image(tmp_path, shape_of())
    assert build_image(tmp_path, shape_of(max_rank=rank)).row.rank.max() == -(-rank // 8) * 8


def test_rank_pattern_cannot_pass_the_border(tmp_path: Path) -> None:
    adapter(tmp_path, 8, ("q_proj", "down_proj"), torch.float32)
    configure(
        tmp_path, r=8, target_modules=["q_proj", "down_proj"], rank_pattern={"1.*down_proj": 72}
    )
    with pytest.raises(InvalidAdapter, match=r"rank 72 .*--max-rank") as refused:
        build_image(tmp_path, shape_of())
    assert refused.value.reason == "ADAPTER_RANK_TOO_HIGH"


def test_piece_larger_than_a_page_is_refused_with_what_to_do(tmp_path: Path) -> None:
    adapter(tmp_path, 64, ("gate_proj", "up_proj"), torch.float32)
    with pytest.raises(InvalidAdapter, match=r"gate_proj.*4096.*--max-rank") as refused:
        build_image(tmp_path, shape_of(elements=4096))
    assert refused.value.reason == "ADAPTER_TOO_LARGE"


def spoil(tensors: Tensors, name: str, value: float) -> None:
    tensors[name][-1, -1] = value


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize(
    ("filed", "dtype", "value"),
    [
        (torch.float32, "float32", float("nan")),
        (torch.float32, "float32", float("inf")),
        (torch.float16, "float32", float("-inf")),
        (torch.bfloat16, "bfloat16", float("nan")),
        (torch.bfloat16, "float32", float("inf")),
        (torch.float16, "bfloat16", float("nan")),
        (torch.float32, "bfloat16", 3.4e38),
        (torch.float32, "bfloat16", -3.4e38),
    ],
)
def test_number_that_is_not_finite_in_the_models_dtype_is_refused_by_name(
    tmp_path: Path, matrix: str, filed: torch.dtype, dtype: str, value: float
) -> None:
    tensors = adapter(tmp_path, 8, ("v_proj",), filed)
    name = tensor_name(1, "v_proj", matrix)
    spoil(tensors, name, value)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match=f"{name} .*not finite.*{dtype}"):
        build_image(tmp_path, shape_of(dtype))


def test_nan_whose_rounding_would_hide_it_is_refused(tmp_path: Path) -> None:
    tensors = adapter(tmp_path, 8, ("v_proj",), torch.float32)
    hidden = struct.unpack("<f", struct.pack("<I", 0x7FFFFFFF))[0]
    spoil(tensors, tensor_name(0, "v_proj", "A"), hidden)
    tensors[tensor_name(0, "v_proj", "A")].view(torch.int32)[0, 0] = 0x7FFFFFFF
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match="not finite"):
        build_image(tmp_path, shape_of("bfloat16"))


def lose_a_tensor(tensors: Tensors) -> None:
    del tensors[tensor_name(1, "v_proj", "B")]


def turn_a_tensor(tensors: Tensors) -> None:
    name = tensor_name(0, "v_proj", "A")
    tensors[name] = tensors[name].T.contiguous()


def widen_a_tensor(tensors: Tensors) -> None:
    name = tensor_name(0, "v_proj", "B")
    tensors[name] = torch.zeros(4096, 8)


def flatten_a_tensor(tensors: Tensors) -> None:
    name = tensor_name(0, "v_proj", "A")
    tensors[name] = tensors[name].flatten()


def store_doubles(tensors: Tensors) -> None:
    name = tensor_name(0, "v_proj", "A")
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    "harm", [lose_a_tensor, turn_a_tensor, widen_a_tensor, flatten_a_tensor, store_doubles]
)
def test_tensor_that_the_config_does_not_ask_for_is_refused_by_name(
    tmp_path: Path, harm: Callable[[Tensors], None]
) -> None:
    tensors = adapter(tmp_path, 8, ("v_proj",), torch.float32)
    harm(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match=r"self_attn\.v_proj\.lora_"):
        build_image(tmp_path, shape_of())
