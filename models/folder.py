"""A base model's folder, as Hugging Face publishes it, and what else people point to instead."""

import json
from contextlib import suppress
from pathlib import Path

from granatum.v1.errors import InvalidRequest

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAY_BE_EMPTY = (".jinja", ".txt")


def model_folder(path: Path) -> Path:
    """The path, if it is a folder with a config.json.

    Raises InvalidRequest: what the path is instead, and what to give.
    """
    try:
        if not (path / CONFIG_FILE).is_file():
            raise InvalidRequest(_refusal(path))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error
    return path


def config_file(path: Path) -> Path:
    """The config.json of a model's folder; a file is taken as that file. Raises as `model_folder`.

    So a router may be given the config.json that lies beside the model's other files.
    """
    named = path.is_file() and path.suffix == ".json"
    file = path if named else model_folder(path) / CONFIG_FILE
    with suppress(OSError):  # reported by whoever reads the fields; here a pointer is refused
        read_whole(file)
    return file


def read_whole(file: Path) -> bytes:
    """The bytes of a file of the model.

    Raises:
        InvalidRequest: the file's content was never downloaded.
        OSError: the file cannot be read.
    """
    content = file.read_bytes()
    refuse_pointer(file, content)
    if not content and file.suffix not in _MAY_BE_EMPTY:
        raise InvalidRequest(f"{file} is empty: download it again")
    return content


def refuse_pointer(file: Path, begin: bytes) -> None:
    """Raise InvalidRequest if a file that begins so only says where Git LFS has its content."""
    if begin.startswith(_POINTER):
        raise InvalidRequest(
            f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, "
            "or download the model with `hf download`"
        )


def adapter_refusal(path: Path) -> str:
    """Why an adapter's folder is no model's, and what to give."""
    return (
        f"{path} is an adapter, not a model: give the folder of {_base_of(path)}, and upload "
        "the adapter with `granatum adapters upload`"
    )


def _refusal(path: Path) -> str:
    """Why the path is no model's folder."""
    if not path.exists():
        return (
            f"{path} does not exist: give a folder with a model, such as "
            "`hf download NAME --local-dir FOLDER` makes"
        )
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return (
            f"{path} is a model in GGUF: give the folder with config.json and safetensors that it "
            "was made from"
        )
    if path.is_file():
        return f"{path} is a file: give the folder of a Hugging Face model"
    if (path / ADAPTER_FILE).exists():
        return adapter_refusal(path)
    if snapshots := sorted(path.glob(f"snapshots/*/{CONFIG_FILE}")):
        return f"{path} holds no {CONFIG_FILE}: give {snapshots[-1].parent}"
    return f"{path} holds no {CONFIG_FILE}: give the folder of a Hugging Face model"


def _base_of(adapter: Path) -> str:
    """What an adapter's folder says that it was trained for."""
    try:
        name = json.loads((adapter / ADAPTER_FILE).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    return f"its base model {name}" if isinstance(name, str) and name else "its base model"
