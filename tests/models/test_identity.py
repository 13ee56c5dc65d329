"""Two models are one only if shape, weights, tokenizer and end tokens all are the same."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granatum.models.base_model import BaseModel
from granatum.models.identity import differences
from granatum.v1.errors import InvalidRequest

LARGE = 65 << 20
"""More bytes than are read in full."""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "eos_token_id": 2,
}
TENSORS = {
    f"model.layers.{layer}.{name}.weight": np.full((16, 16), layer, np.float32)
    for layer in range(2)
    for name in ("self_attn.q_proj", "mlp.up_proj")
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, as save_pretrained leaves it."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "config.json", CONFIG)
    write(folder / "generation_config.json", {"eos_token_id": [2, 3]})
    write(folder / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    write(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def identity(folder: Path) -> str:
    return BaseModel.from_config(folder).fingerprint


def one_layer_trained(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 7] += 1e-3
    save_file(tensors, folder / "model.safetensors")


def a_tensor_of_another_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] = tensors.pop(
        "model.layers.1.mlp.up_proj.weight"
    )
    save_file(tensors, folder / "model.safetensors")


def writes(name: str, content: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write(folder / name, content)

    return change


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (one_layer_trained, "weights"),
        (a_tensor_of_another_name, "weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
        (writes("tokenizer.json", {"model": {"vocab": {"b": 0}}}), "tokenizer"),
        (writes("tokenizer_config.json", {"chat_template": "{{ other }}"}), "tokenizer"),
        (writes("special_tokens_map.json", {"bos_token": "<s>"}), "tokenizer"),
        (writes("added_tokens.json", {"<pad>": 40}), "tokenizer"),
        (writes("chat_template.jinja", "{{ messages[0] }}"), "tokenizer"),
        (writes("tokenizer.model", "pieces"), "tokenizer"),
        (writes("generation_config.json", {"eos_token_id": [2, 4]}), "end tokens"),
        (lambda folder: (folder / "generation_config.json").unlink(), "end tokens"),
        (writes("config.json", {**CONFIG, "eos_token_id": 5}), "end tokens"),
        (writes("config.json", {**CONFIG, "rms_norm_eps": 1e-3}), "shape"),
    ],
)
def test_a_change_of_one_part_is_another_model_and_is_named(
    change: Callable[[Path], None], part: str, model: Path
) -> None:
    before = identity(model)
    change(model)
    after = identity(model)
    assert differences(before, after) == (part,)
    assert len(before) == len(after) == 64
    assert differences(after, after) == ()


def test_the_same_model_in_another_place_and_in_other_files_is_the_same(
    model: Path, tmp_path: Path
) -> None:
    """The folder's name, the shards, the order of end tokens and what is beside it do not count."""
    before = identity(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    shards: dict[str, str] = {}
    for index, (name, tensor) in enumerate(sorted(TENSORS.items(), reverse=True)):
        shards[name] = f"model-{index}.safetensors"
        save_file({name: tensor}, copy / shards[name])
    (copy / "model.safetensors").rename(copy / "consolidated.safetensors")
    write(copy / "model.safetensors.index.json", {"weight_map": shards})
    write(copy / "config.json", {**CONFIG, "torch_dtype": "bfloat16"})
    write(copy / "generation_config.json", {"eos_token_id": [3, 2]})
    (copy / "README.md").write_text("notes")
    assert identity(copy) == before
    assert identity(copy / "config.json") == before, "the files beside a config.json count"


def test_a_folder_that_holds_a_configuration_alone_has_an_identity(tmp_path: Path) -> None:
    write(tmp_path / "config.json", CONFIG)
    assert identity(tmp_path) == identity(tmp_path)


def test_a_file_that_cannot_be_read_is_named(model: Path) -> None:
    (model / "merges.txt").mkdir()
    with pytest.raises(InvalidRequest, match=r"merges\.txt"):
        identity(model)


def test_generation_settings_that_are_no_json_are_named(model: Path) -> None:
    for text in ("{", "[" * 100_000):
        (model / "generation_config.json").write_text(text)
        with pytest.raises(InvalidRequest, match=r"generation_config\.json is not JSON"):
            identity(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", ["2", True, 2.0, ["</s>"], [[2]], {"id": 2}])
def test_end_tokens_that_are_no_ids_are_named(file: str, ids: Any, model: Path) -> None:
    config = json.loads((model / file).read_text())
    write(model / file, {**config, "eos_token_id": ids})
    with pytest.raises(InvalidRequest, match=f"{file}: eos_token_id = .* must be a token id or a"):
        identity(model)


def sparse_model(folder: Path, tensors: int, elements: int) -> None:
    """Weights of zeros that take no room on the disk."""
    size = 2 * elements
    header = json.dumps(
        {
            f"t{index:03}": {
                "dtype": "BF16",
                "shape": [elements],
                "data_offsets": [index * size, (index + 1) * size],
            }
            for index in range(tensors)
        }
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + tensors * size)


@pytest.mark.parametrize("place", ["begin", "middle", "end"])
def test_a_tensor_of_which_a_third_was_trained_in_a_large_model_is_noticed(
    place: str, model: Path
) -> None:
    size = LARGE // 3
    sparse_model(model, tensors=3, elements=size // 2)
    before = identity(model)
    with (model / "model.safetensors").open("r+b") as file:
        tensor = file.seek(0, os.SEEK_END) - size
        file.seek(tensor + {"begin": 0, "middle": size // 3, "end": 2 * size // 3}[place])
        file.write(b"\1" * (size // 3))
    assert differences(before, identity(model)) == ("weights",)


def test_an_eight_billion_model_takes_less_than_a_second(model: Path) -> None:
    sparse_model(model, tensors=291, elements=8_000_000_000 // 291)
    began = time.monotonic()
    identity(model)
    assert time.monotonic() - began < 1.0


def test_it_needs_neither_torch_nor_safetensors() -> None:
    program = (
        "import sys, granatum.models.identity; "
        "print(*{*sys.modules} & {'torch', 'transformers', 'safetensors', 'numpy'})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []


def test_a_models_name_is_its_folders_even_where_its_files_are_links(
    model: Path, tmp_path: Path
) -> None:
    blob = (model / "config.json").rename(tmp_path / "blob")
    (model / "config.json").symlink_to(blob)
    assert BaseModel.from_config(model).name == "model"
