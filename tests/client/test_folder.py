"""Every folder that is no PEFT adapter's is called what it is, with a way out."""

from pathlib import Path

import pytest

from granatum.client.folder import check_folder
from granatum.v1.errors import InvalidRequest

FOLDERS: dict[str, tuple[list[str], str]] = {
    "pickle": (["adapter_config.json", "adapter_model.bin"], "granatum adapters convert {} OUT"),
    "mlx": (["adapter_config.json", "adapters.safetensors"], "written by MLX: run granatum"),
    "old mlx": (["adapters.npz"], "an old mlx-lm"),
    "diffusers": (["pytorch_lora_weights.safetensors"], "a diffusion model"),
    "gguf": (["lora.gguf"], "a GGUF file: upload the PEFT adapter"),
    "whole model": (["config.json", "model-00001-of-00002.safetensors"], "is a whole model"),
    "whole pickled model": (["config.json", "pytorch_model.bin"], "is a whole model"),
    "checkpoints": (
        ["checkpoint-90/adapter_config.json", "checkpoint-1000/adapter_config.json", "config.json"],
        "upload one of them, such as {}/checkpoint-1000",
    ),
    "named": (["sales/adapter_config.json", "README.md"], "such as {}/sales"),
    "no weights": (["adapter_config.json"], "has adapter_config.json and no adapter_model."),
    "no configuration": (["adapter_model.safetensors"], "has no adapter_config.json: take it"),
    "something else": (["notes.txt"], "give the folder that PEFT's save_pretrained wrote"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_the_folder_is(case: str, tmp_path: Path) -> None:
    files, message = FOLDERS[case]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InvalidRequest) as error:
        check_folder(tmp_path)
    assert error.value.message.startswith(f"{tmp_path} ")
    assert message.format(tmp_path) in error.value.message


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is not there: give the folder"):
        check_folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="is a file: give the folder"):
        check_folder(tmp_path / "file")


def test_the_two_files_are_enough_whatever_lies_beside_them(tmp_path: Path) -> None:
    others = ("adapter_model.bin", "tokenizer.json", "additional_config.json", "config.json")
    for name in ("adapter_config.json", "adapter_model.safetensors", *others):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").touch()
    check_folder(tmp_path)
