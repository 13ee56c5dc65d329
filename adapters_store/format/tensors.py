"""An adapter's tensors by PEFT's own names, whatever wrappers its trainer left in the names.

This is the only place that knows other names than PEFT's. The file keeps its names, since its
digest is the adapter's identity; whoever reads tensors reads them through `read_tensors`.
"""

import re
from pathlib import Path

from granatum.adapters_store.format.modules import CONFIG_FILE, tensor_name
from granatum.adapters_store.format.safetensors_file import (
    TensorEntry,
    invalid_weights,
    read_header,
)
from granatum.adapters_store.limits import UploadLimits
from granatum.adapters_store.names import shown
from granatum.models.base_model import BaseModel

# torch.compile and FSDP put their wrappers anywhere into a name.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Before the layers stand PEFT's prefix, a part of it or nothing, DDP's wrapper, and the name that a
# model of text and images gives to its decoder. After A or B may stand the adapter's own name.
_MATRIX = re.compile(
    r"(?:(?:base_model|model|module|language_model)\.)*"
    r"(layers\.\d{1,6}\..+)\.lora_([AB])(?:\.[^.]+)?\.weight"
)
_OF_TRAINING = re.compile(r"\.lora_(?:velora_embed|monteclora_sampler)(?:\.|$)")
"""Tensors of PEFT's options that have no effect once a model is trained."""
_HINTS = (
    (re.compile(r"[/\\]|\.\."), "its name looks like a path"),
    (re.compile(r"lora_magnitude"), "it belongs to DoRA, which cannot be served"),
    (re.compile(r"lora_embedding"), "embeddings cannot be adapted"),
    (re.compile(r"lora_[AB](?:\.[^.]+)?\.bias$"), "biases of LoRA's own matrices are not applied"),
    (
        re.compile(r"lora_[ab]$"),
        "MLX wrote it: make a PEFT adapter of the folder with granatum adapters convert",
    ),
    (re.compile(r"lora_(?:down|up|unet|te)|^unet\."), "it adapts a diffusion model"),
    (re.compile(r"vis(?:ion|ual)"), "it adapts a vision tower, and text alone is served"),
    (
        re.compile(r"linear_(?:qkv|proj|fc[12])\."),
        "its module is Megatron's: export the adapter to Hugging Face's names",
    ),
    (re.compile(r"experts?\."), "experts cannot be adapted"),
    (
        re.compile(r"(?<!lora_A)(?<!lora_B)\.weight$"),
        "it is a whole weight: upload a LoRA adapter, not a model",
    ),
)


def read_tensors(path: Path, limits: UploadLimits) -> dict[str, TensorEntry]:
    """A weights file's tensors by the names that PEFT's save_pretrained gives them.

    An entry keeps the name that the file gives it. A name that is certain to mean one of PEFT's
    counts as PEFT's; any other stays as it is. Raises InvalidAdapter if the file is damaged, or if
    two of its names mean one tensor.
    """
    found: dict[str, TensorEntry] = {}
    for entry in read_header(path, limits).values():
        if _OF_TRAINING.search(entry.name):
            continue
        other = found.setdefault(name_of_peft(entry.name), entry)
        if other is not entry:
            raise invalid_weights(
                f"tensors {shown(other.name)} and {shown(entry.name)} are the same one by PEFT's "
                "naming: keep one adapter in the file"
            )
    return found


def name_of_peft(name: str) -> str:
    """PEFT's name for the tensor that a file calls `name`; `name` itself if that is not certain."""
    matrix = _MATRIX.fullmatch(_WRAPPER.sub("", name))
    if matrix is None:
        return name
    return tensor_name(f"model.{matrix[1]}", "A" if matrix[2] == "A" else "B")


def why_unknown(name: str, base: BaseModel) -> str:
    """Why the tensor, by PEFT's name where it has one, belongs to no module of the adapter."""
    at = _MATRIX.fullmatch(name)
    if at is None:
        hints = (hint for pattern, hint in _HINTS if pattern.search(name))
        return next(hints, "it is no LoRA matrix of a decoder layer")
    _, layer, path = at[1].split(".", 2)
    if int(layer) >= base.num_layers:
        return f"the base model {base.name} has {base.num_layers} layers"
    if path not in {module.path for module in base.modules.values()}:
        hints = (hint for pattern, hint in _HINTS if pattern.search(name))
        return next(hints, f"only {', '.join(base.modules)} can be adapted")
    return f"{CONFIG_FILE} does not target its module"
