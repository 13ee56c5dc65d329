"""What `granatum adapters convert` refuses; what it makes is tested with the engine."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from granatum.cli.convert import convert_adapter
from granatum.client.chat_files import chat_settings
from granatum.examples.tokenizer import byte_tokenizer
from granatum.v1.errors import InvalidRequest, PreconditionFailed

NAME = "model.layers.0.self_attn.q_proj"
TENSORS = {f"{NAME}.lora_a": torch.zeros(16, 4), f"{NAME}.lora_b": torch.zeros(4, 32)}
SETTINGS: dict[str, Any] = {"lora_parameters": {"rank": 4, "scale": 20.0}}


def mlx(folder: Path, config: Any = SETTINGS, **tensors: torch.Tensor) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(TENSORS | tensors, folder / "adapters.safetensors")
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        convert_adapter(folder, folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SETTINGS, "fine_tune_type": "dora"}, "fine_tune_type is 'dora': only 'lora'"),
        ({**SETTINGS, "fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({**SETTINGS, "use_dora": True}, "fine_tune_type is 'dora'"),
        ({"lora_parameters": {"rank": 4, "scale": 20.0, "alpha": 16}}, "scale . alpha / rank"),
        ({"lora_parameters": {"rank": 4}}, "no lora_parameters with a scale"),
        ({"lora_parameters": 1}, "no lora_parameters with a scale"),
        ({"r": 4}, "no lora_parameters with a scale"),
        ([], "no lora_parameters with a scale"),
        ({"lora_parameters": {"scale": "2"}}, "scale must be a number"),
        ({"lora_parameters": {"scale": float("nan")}}, "scale must be a number"),
        ({"lora_parameters": {"scale": 10**400}}, "scale must be a number"),
    ],
)
def test_settings_that_cannot_be_served(config: Any, message: str, tmp_path: Path) -> None:
    refused(mlx(tmp_path, config), f"adapter_config.json.*{message}")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{NAME}.m", torch.zeros(32), "is no lora_a or lora_b of a layer's linear"),
        ("model.embed_tokens.lora_a", torch.zeros(64, 4), "is no lora_a or lora_b of a layer"),
        (f"{NAME}.lora_a", torch.zeros(2, 16, 4), r"of shape \[2, 16, 4\] is no lora_a"),
        (f"{NAME}.lora_a", torch.zeros(16, 4, dtype=torch.int32), "is I32: save it as float32"),
    ],
)
def test_tensors_that_cannot_be_served(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    refused(mlx(tmp_path, **{name: tensor}), message)


@pytest.mark.parametrize("length", [0, 4, 9, 100, -1])
def test_a_file_that_was_cut_off(length: int, tmp_path: Path) -> None:
    weights = mlx(tmp_path) / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    refused(tmp_path, "is damaged or no safetensors file")


@pytest.mark.parametrize("shape", [[-2, -2], [2.0, 2.0], [0, 2], "ab", [True, 4]])
def test_shapes_that_are_none(shape: object, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}
    header = json.dumps({f"{NAME}.lora_a": entry}).encode()
    weights = mlx(tmp_path) / "adapters.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refused(tmp_path, "is damaged or no safetensors file")


def test_an_alpha_that_changes_nothing(tmp_path: Path) -> None:
    mlx(tmp_path, {"lora_parameters": {"rank": 4, "scale": 20.0, "alpha": 4.0}})
    convert_adapter(tmp_path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 80


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    refused(tmp_path, "was not opened, since it could run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("state", [[torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}, b"junk"])
def test_a_pickle_of_other_things(state: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = tmp_path / "adapter_model.bin"
    if isinstance(state, bytes):
        weights.write_bytes(state)
    else:
        torch.save(state, weights)
    refused(tmp_path, "holds something besides tensors, or is damaged")


def test_numbers_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": torch.zeros(1, dtype=torch.float64)}, tmp_path / "adapter_model.bin")
    refused(tmp_path, "a is torch.float64: save it as float32")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(4).to_sparse(),
        torch.zeros(2, 4, device="meta"),
        torch.zeros(1).expand(1 << 30, 1 << 30),
    ],
    ids=["sparse", "without data", "too large"],
)
def test_tensors_that_are_not_plain(tensor: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": tensor}, tmp_path / "adapter_model.bin")
    refused(tmp_path, "a is no plain tensor")


def test_a_pointer_in_place_of_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, "is a Git LFS pointer to the file: run git lfs pull")


def test_a_pickle_that_is_called_safetensors(tmp_path: Path) -> None:
    """The server's advice for one is to convert it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "adapter_model.safetensors")
    convert_adapter(tmp_path, tmp_path / "out")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(made["a"], torch.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_without_its_libraries_it_says_what_to_install(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(PreconditionFailed, match=f"{library} is missing here: pip install torch"):
        convert_adapter(tmp_path, tmp_path / "out")


def test_where_there_is_nothing_to_convert(tmp_path: Path) -> None:
    refused(tmp_path, "give the folder that PEFT's save_pretrained wrote")
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / name).touch()
    refused(tmp_path, "is a PEFT adapter already: upload it")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    out.mkdir()
    with pytest.raises(InvalidRequest, match=r"cannot write .* name a new folder"):
        convert_adapter(mlx(out), out)
    assert sorted(f.name for f in out.iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_what_the_folder_says_of_chats_stays(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ messages }}"
    made.save_pretrained(mlx(tmp_path))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": made.pad_token_id})
    )
    convert_adapter(tmp_path, tmp_path / "out")
    settings = json.loads(chat_settings(tmp_path / "out") or b"")
    assert settings == {"chat_template": "{{ messages }}", "end_tokens": ["</s>", "<pad>"]}
