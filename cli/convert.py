"""`granatum adapters convert`: a folder that another trainer wrote, as a PEFT adapter.

It runs on the user's machine and talks to no server. A pickle is opened with torch, which is told
to build tensors alone. MLX's files need nothing but the standard library.
"""

import json
import math
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from granatum.client.chat_files import SOURCES
from granatum.client.folder import CONFIG, MLX_WEIGHTS, PICKLED, WEIGHTS, check_folder
from granatum.v1.errors import InvalidRequest, PreconditionFailed

_WORDS: dict[str, Literal["I", "H"]] = {"F32": "I", "F16": "H", "BF16": "H"}
"""An integer of each dtype's size. Numbers are moved, never computed with."""
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LFS_POINTER = b"version https://git-lfs"
_ALIGNMENT = 8
_MAX_SCALE = 1e20
_MLX_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


class Tensor(NamedTuple):
    """A tensor as a safetensors file holds it: row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


class MlxSettings(NamedTuple):
    """What an MLX folder's adapter_config.json says beside its tensors."""

    scale: float
    alpha: object
    """None if the file has none."""
    model: str | None
    """What MLX trained on."""

    def check_alpha(self, file: Path, ranks: set[int]) -> None:
        """Raise InvalidRequest if the scale depends on which mlx-lm trained.

        Old ones multiplied by `scale * alpha / rank`. Later ones ignore an `alpha`.
        """
        if self.alpha is not None and {self.alpha} != ranks:
            raise InvalidRequest(
                f"{file}: old versions of mlx-lm multiply by lora_parameters.scale * alpha / rank, "
                "later ones by scale alone, and the file does not say which one trained: remove "
                "alpha, and if mlx_lm/tuner/lora.py has an alpha where it trained, multiply scale "
                "by alpha / rank"
            )


def convert_adapter(
    folder: Annotated[Path, typer.Argument(help="What MLX wrote, or a folder with a .bin.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the PEFT adapter.")],
) -> None:
    """Make a PEFT adapter of an MLX folder, or of a folder with its weights in a pickle.

    What the folder's tokenizer files say of chats stays with the adapter.
    """
    if (folder / MLX_WEIGHTS).is_file():
        config, tensors = _of_mlx(folder)
    elif pickled := _pickled(folder):
        config, tensors = _read(folder / CONFIG), _unpickled(pickled)
    else:
        check_folder(folder)
        raise InvalidRequest(f"{folder} is a PEFT adapter already: upload it as it is")
    try:
        out.mkdir(parents=True)
        (out / CONFIG).write_bytes(config)
        _write(out / WEIGHTS, tensors)
        for name in SOURCES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    except OSError as error:
        raise InvalidRequest(f"cannot write {out} ({error.strerror}): name a new folder") from None
    typer.echo(f"{out} is a PEFT adapter: granatum adapters upload NAME {out}")


def _pickled(folder: Path) -> Path | None:
    """The folder's weights if they are a pickle, whatever their file is called."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        return folder / PICKLED if (folder / PICKLED).is_file() else None
    with weights.open("rb") as file:
        start = file.read(9)
    # A safetensors file may begin with the same bytes, but it has a brace behind its first eight.
    is_pickle = start.startswith(_PICKLES) and start[8:] != b"{"
    return weights if is_pickle else None


def _of_mlx(folder: Path) -> tuple[bytes, dict[str, Tensor]]:
    """PEFT's two files of MLX's. MLX computes y + scale * (x A) B, with A `[in, r]`, B `[r, out]`.

    PEFT computes y + alpha / r * B (A x), with both matrices transposed.
    """
    settings = _mlx_settings(folder / CONFIG)
    tensors, ranks = {}, {}
    for name, tensor in _parsed(folder / MLX_WEIGHTS):
        module, _, matrix = name.rpartition(".")
        if matrix not in _MLX_NAMES or ".layers." not in f".{module}" or len(tensor.shape) != 2:
            raise InvalidRequest(
                f"{folder / MLX_WEIGHTS}: {name} of shape {list(tensor.shape)} is no lora_a or "
                "lora_b of a layer's linear, and nothing else can be served: train without it"
            )
        tensors[f"base_model.model.{module}.{_MLX_NAMES[matrix]}"] = _transposed(tensor)
        ranks[module] = tensor.shape[1 if matrix == "lora_a" else 0]
    if not ranks:
        raise InvalidRequest(f"{folder / MLX_WEIGHTS} holds no tensors: train again")
    settings.check_alpha(folder / CONFIG, set(ranks.values()))
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.model,
        "target_modules": sorted(f"layers.{module.partition('layers.')[2]}" for module in ranks),
        **_ranks(ranks, settings.scale),
    }
    return json.dumps(fields, indent=2).encode(), tensors


def _ranks(ranks: dict[str, int], scale: float) -> dict[str, object]:
    """PEFT's fields for modules of these ranks, which MLX all multiplies by `scale`."""
    usual = max(ranks.values())
    others = {
        f"layers.{module.partition('layers.')[2]}": rank
        for module, rank in ranks.items()
        if rank != usual
    }
    return {
        "r": usual,
        "lora_alpha": scale * usual,
        "rank_pattern": others,
        "alpha_pattern": {module: scale * rank for module, rank in others.items()},
    }


def _mlx_settings(path: Path) -> MlxSettings:
    """What the file says. Raises InvalidRequest unless it is MLX's, of a plain LoRA."""
    try:
        fields = json.loads(_read(path))
        kind, settings = fields.get("fine_tune_type", "lora"), fields["lora_parameters"]
        scale, alpha, model = settings["scale"], settings.get("alpha"), fields.get("model")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InvalidRequest(
            f"{path} has no lora_parameters with a scale: take the file that mlx-lm wrote"
        ) from None
    if fields.get("use_dora"):  # mlx-lm before it had fine_tune_type
        kind = "dora"
    if kind != "lora":
        raise InvalidRequest(f"{path}: fine_tune_type is {kind!r}: only 'lora' can be served")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not abs(scale) <= _MAX_SCALE:
        raise InvalidRequest(f"{path}: lora_parameters.scale must be a number up to {_MAX_SCALE:g}")
    return MlxSettings(scale, alpha, model if isinstance(model, str) else None)


def _transposed(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape
    words = memoryview(tensor.data).cast(_WORDS[tensor.dtype])
    data = b"".join(words[column::columns].tobytes() for column in range(columns))
    return Tensor(tensor.dtype, (columns, rows), data)


def _parsed(path: Path) -> Iterator[tuple[str, Tensor]]:
    """A safetensors file's tensors. Raises InvalidRequest if it is none, or of other numbers."""
    data = memoryview(_read(path))
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        found = [
            (name, Tensor(e["dtype"], _sizes(e["shape"]), data[start:][slice(*e["data_offsets"])]))
            for name, e in header.items()
        ]
        whole = all(
            len(tensor.data) == math.prod(tensor.shape) * _item_size(tensor.dtype)
            for _, tensor in found
            if tensor.dtype in _WORDS
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole, found = False, []
    if not whole:
        raise InvalidRequest(f"{path} is damaged or no safetensors file: copy it again")
    for name, tensor in found:
        if tensor.dtype not in _WORDS:
            raise InvalidRequest(
                f"{path}: {name} is {tensor.dtype}: save it as float32, float16 or bfloat16"
            )
        yield name, tensor


def _sizes(shape: list[object]) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if type(size) is int and size > 0)
    if len(sizes) != len(shape):
        raise ValueError
    return sizes


def _item_size(dtype: str) -> int:
    return 4 if _WORDS[dtype] == "I" else 2


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict. Nothing but tensors is unpickled."""
    try:
        import numpy  # noqa: F401 - torch gives a tensor's bytes through it
        import torch
    except ImportError as error:
        raise PreconditionFailed(
            f"{path.name} is opened with torch, and {error.name} is missing here: "
            "pip install torch numpy"
        ) from None
    data = _read(path)
    if data.startswith(_LFS_POINTER):
        raise InvalidRequest(f"{path} is a Git LFS pointer to the file: run git lfs pull")
    try:
        # By its path, torch would take a pickle that is called .safetensors for one of these.
        state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and torch.is_tensor(t) for name, t in state.items()
        ):
            raise ValueError
    except Exception:
        # torch raises many kinds here; its advice to load all the same must not reach users.
        raise InvalidRequest(
            f"{path} holds something besides tensors, or is damaged: it was not opened, since it "
            "could run code; save the adapter again with PEFT's save_pretrained"
        ) from None
    return {name: _of_torch(path, name, tensor) for name, tensor in state.items()}


def _of_torch(path: Path, name: str, tensor: Any) -> Tensor:
    import torch

    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if tensor.dtype not in dtypes:
        raise InvalidRequest(
            f"{path}: {name} is {tensor.dtype}: save it as float32, float16 or bfloat16"
        )
    try:
        numbers = tensor.detach().resolve_neg().contiguous().flatten().view(torch.uint8).numpy()
    except (RuntimeError, TypeError):
        raise InvalidRequest(
            f"{path}: {name} is no plain tensor (sparse, without data, or too large for this "
            "machine): save the adapter again with PEFT's save_pretrained"
        ) from None
    return Tensor(dtypes[tensor.dtype], tuple(tensor.shape), numbers.data)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of the tensors, in their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {path} ({error.strerror}): give the folder that the training wrote"
        ) from None
