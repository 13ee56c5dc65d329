"""What people point to instead of a model, and folders that are not whole: each has its words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from granatum.models.base_model import BaseModel
from granatum.models.checkpoint import INDEX_FILE, required_weight_files, weight_files
from granatum.models.folder import config_file, model_folder
from granatum.v1.errors import InvalidRequest

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 9000\n"
WEIGHTS = "model.safetensors"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
TENSORS = {f"model.layers.{n}.mlp.up_proj.weight": np.ones((24, 16), "f") for n in range(3)}


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def adapter(name: str | None) -> Callable[[Path], None]:
    return lambda path: write(path / "adapter_config.json", {"base_model_name_or_path": name})


def gguf(path: Path) -> None:
    (path / "model-q4.gguf").write_bytes(b"GGUF")


def cached(path: Path) -> None:
    (path / "snapshots" / "abc").mkdir(parents=True)
    write(path / "snapshots" / "abc" / "config.json", {})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.rmdir(), "does not exist: give a folder with a model, such as `hf down"),
        (lambda path: None, "holds no config.json: give the folder of a Hugging Face model"),
        (gguf, "is a model in GGUF: give the folder with config.json and safetensors"),
        (adapter("org/base"), "is an adapter, not a model: give the folder of its base model org/"),
        (adapter(None), "is an adapter, not a model: give the folder of its base model, and"),
        (cached, "holds no config.json: give .*/it/snapshots/abc$"),
    ],
)
def test_what_is_no_model_is_named(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.mkdir()
    make(path)
    for take in (model_folder, config_file, BaseModel.from_config):
        with pytest.raises(InvalidRequest, match=f"{path} {said}"):
            take(path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for take in (model_folder, config_file):
        with pytest.raises(InvalidRequest, match="is a model in GGUF"):
            take(file)
    other = file.rename(tmp_path / "model.bin")
    with pytest.raises(InvalidRequest, match="is a file: give the folder"):
        model_folder(other)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder / "config.json", CONFIG)
    write(folder / "generation_config.json", {})
    write(folder / "tokenizer.json", {})
    write(folder / "tokenizer_config.json", {})
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "chat_template.jinja").write_text("")
    (folder / "merges.txt").write_text("")
    save_file(TENSORS, folder / WEIGHTS)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidRequest) as caught:
        BaseModel.from_config(folder)
    return caught.value.message


FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", WEIGHTS, INDEX_FILE),
)


def shard(folder: Path) -> None:
    """Two files instead of one."""
    (folder / WEIGHTS).unlink()
    names = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        names[name] = f"model-{number % 2}.safetensors"
        save_file({name: tensor}, folder / names[name])
    write(folder / INDEX_FILE, {"weight_map": names})


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_not_downloaded_is_named(name: str, model: Path) -> None:
    if name == INDEX_FILE:
        shard(model)
    (model / name).write_bytes(POINTER)
    assert refusal(model).startswith(f"{model / name} is a Git LFS pointer, not the file itself")
    (model / name).write_bytes(b"")
    assert refusal(model).startswith(f"{model / name} is empty")


@pytest.mark.parametrize("kept", [3, 8, 60, -1])
def test_a_file_that_is_cut_off_is_named(kept: int, model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:kept])
    said = refusal(model)
    assert said.startswith(f"{model / WEIGHTS} ")
    assert said.endswith(": download it again")


@pytest.mark.parametrize(
    "offsets", [[-8, 0], [0, 1 << 40], [0, 4], [8, 0], [0.0, 8.0], ["a", "b"], [0], None]
)
def test_a_header_that_lies_is_named(offsets: Any, model: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (model / WEIGHTS).write_bytes(data)
    assert refusal(model).startswith(f"{model / WEIGHTS} ")


def test_a_missing_shard_is_named(model: Path) -> None:
    shard(model)
    assert [file.name for file in weight_files(model)] == [
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    (model / "model-1.safetensors").unlink()
    assert "lacks 1 of the 2 files" in refusal(model)
    assert "such as model-1.safetensors: download" in refusal(model)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_an_index_that_is_none_is_named(text: str, model: Path) -> None:
    shard(model)
    (model / INDEX_FILE).write_text(text)
    assert f"{INDEX_FILE} is no index of weights" in refusal(model)


def test_a_single_file_counts_before_an_index(model: Path) -> None:
    """As in transformers."""
    write(model / INDEX_FILE, {"weight_map": {"a": "gone.safetensors"}})
    assert weight_files(model) == [model / WEIGHTS]


def test_an_adapter_beside_the_weights_is_refused(model: Path) -> None:
    write(model / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    assert weight_files(model) == [model / WEIGHTS]
    with pytest.raises(InvalidRequest, match=r"a model and an adapter: move adapter_config\.json"):
        required_weight_files(model)


def test_weights_in_another_format_are_refused_with_the_way_out(model: Path) -> None:
    (model / WEIGHTS).unlink()
    assert weight_files(model) == []
    with pytest.raises(InvalidRequest, match="download the model with all its files"):
        required_weight_files(model)
    (model / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"only such files as consolidated\.safetensors: down"):
        required_weight_files(model)
    write(model / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    with pytest.raises(InvalidRequest, match=r"adapter, .* the folder of its base model org"):
        required_weight_files(model)
    (model / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidRequest, match="in safetensors, not in GGUF"):
        required_weight_files(model)
    (model / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(InvalidRequest, match=r"reads no \.bin files, .* convert them with `python"):
        required_weight_files(model)
