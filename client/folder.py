"""What a folder is that a user takes for an adapter's, and the way from there to an upload."""

from collections.abc import Iterator
from pathlib import Path

from granatum.v1.errors import InvalidRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
_WHOLE_MODEL = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")
_CONVERT = "run granatum adapters convert {} OUT, and upload OUT"


def check_folder(directory: Path) -> None:
    """Raise InvalidRequest unless the directory has the two files of a PEFT adapter.

    The message says what the directory is instead, and what to do.
    """
    try:
        reason = _fault(directory)
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    if reason:
        raise InvalidRequest(f"{directory} {reason}")


def _fault(directory: Path) -> str:
    """What is wrong with the directory; empty if nothing is."""
    if not directory.is_dir():
        what = "is a file" if directory.is_file() else "is not there"
        return f"{what}: give the folder that PEFT's save_pretrained wrote"
    names = sorted(entry.name for entry in directory.iterdir())
    if {CONFIG, WEIGHTS} <= set(names):
        return ""
    return next(_otherwise(directory, names))


def _otherwise(directory: Path, names: list[str]) -> Iterator[str]:
    """What the directory is, the most telling first."""
    convert = _CONVERT.format(directory)
    if MLX_WEIGHTS in names:
        yield f"was written by MLX: {convert}"
    if "adapters.npz" in names:
        yield f"was written by an old mlx-lm: save it as {MLX_WEIGHTS} with a current one"
    if CONFIG in names and PICKLED in names:
        yield f"has its weights in {PICKLED}, a pickle, which no server opens: {convert}"
    if "pytorch_lora_weights.safetensors" in names:
        yield "holds an adapter for a diffusion model, and language models are served"
    inner = _adapters_within(directory)
    if inner:
        yield f"holds adapters in folders of its own: upload one of them, such as {inner[-1]}"
    if any(name.endswith(".gguf") for name in names):
        yield "holds a GGUF file: upload the PEFT adapter that it was made from"
    if CONFIG in names:
        yield (
            f"has {CONFIG} and no {WEIGHTS}: the training saved no weights there; save the adapter "
            "with PEFT's save_pretrained"
        )
    if "config.json" in names and any(any(directory.glob(form)) for form in _WHOLE_MODEL):
        yield (
            "is a whole model: upload the LoRA adapter alone, as PEFT's save_pretrained writes it "
            "before it is merged. A model that was trained without LoRA is served by runners of "
            "its own"
        )
    if WEIGHTS in names or PICKLED in names:
        yield f"has no {CONFIG}: take it from the training's folder; it says rank and scale"
    yield f"has no {CONFIG} and no {WEIGHTS}: give the folder that PEFT's save_pretrained wrote"


def _adapters_within(directory: Path) -> list[Path]:
    """The folders below that hold an adapter, the newest checkpoint last."""
    found = [file.parent for file in directory.glob(f"*/{CONFIG}")]
    return sorted(found, key=_step)


def _step(folder: Path) -> tuple[int, str]:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and len(number) < 20 else 0, folder.name
