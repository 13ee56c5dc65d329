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
    r"(?P<prefix>(?:(?:base_model|model|module|language_model)\.)*)"
    r"(?P<module>layers\.\d{1,6}\..+)\.lora_(?P<matrix>[AB])(?P<adapter>\.[^.]+)?\.weight"
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
    (
        re.compile(r"lora_[ab]\.weight$"),
        "torchtune wrote it, which orders heads in its own way: save the adapter with torchtune's "
        "checkpointer for Hugging Face's models, which also writes PEFT's files",
    ),
    (re.compile(r"lora_(?:down|up|unet|te)|^unet\."), "it adapts a diffusion model"),
    (re.compile(r"vis(?:ion|ual)"), "it adapts a vision tower, and text alone is served"),
    (
        re.compile(r"linear_(?:qkv|proj|fc[12]|in|out)\."),
        "its module is Megatron's: export the adapter to Hugging Face's names",
    ),
    (re.compile(r"(?:^|\.)v_head\."), "it is the value head of a training: save without it"),
    (re.compile(r"(?:lm_head|embed_tokens)\.weight$"), "whole modules are not replaced"),
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
    it holds the tensors of two adapters.
    """
    found: dict[str, TensorEntry] = {}
    first: tuple[str, str] | None = None
    for entry in read_header(path, limits).values():
        if _OF_TRAINING.search(entry.name):
            continue
        other = found.setdefault(name_of_peft(entry.name), entry)
        if other is not entry:
            raise invalid_weights(
                f"tensors {shown(other.name)} and {shown(entry.name)} are the same one by PEFT's "
                "naming: keep one adapter in the file"
            )
        owner = _owner(entry.name)
        if owner is not None:
            first = first or (entry.name, owner)
            if owner != first[1]:
                raise invalid_weights(
                    f"tensors {shown(first[0])} and {shown(entry.name)} are of two adapters by "
                    "their names: keep one adapter in the file, or give all tensors one prefix"
                )
    return found


def name_of_peft(name: str) -> str:
    """PEFT's name for the tensor that a file calls `name`; `name` itself if that is not certain."""
    at = _MATRIX.fullmatch(_WRAPPER.sub("", name))
    if at is None:
        return name
    return tensor_name(f"model.{at['module']}", "A" if at["matrix"] == "A" else "B")


def _owner(name: str) -> str | None:
    """What a name says of the adapter that has the tensor; None if the name is not understood."""
    at = _MATRIX.fullmatch(_WRAPPER.sub("", name))
    return at and f"{at['prefix']}{at['adapter'] or ''}"


def why_unknown(name: str, base: BaseModel) -> str:
    """Why the tensor, by PEFT's name where it has one, belongs to no module of the adapter."""
    at = _MATRIX.fullmatch(name)
    if at is None:
        hints = (hint for pattern, hint in _HINTS if pattern.search(name))
        return next(hints, "it is no LoRA matrix of a decoder layer")
    _, layer, path = at["module"].split(".", 2)
    if int(layer) >= base.num_layers:
        return f"the base model {base.name} has {base.num_layers} layers"
    if path not in {module.path for module in base.modules.values()}:
        hints = (hint for pattern, hint in _HINTS if pattern.search(name))
        return next(hints, f"only {', '.join(base.modules)} can be adapted")
    return f"{CONFIG_FILE} does not target its module"
