"""Adapters' files and uploads, made with json and numpy, independent of the code under test."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Shape:
    """A base model: its layers, and each projection's (in_features, out_features)."""

    num_layers: int
    features: Mapping[str, tuple[int, int]]

    def module(self, projection: str, layer: int = 0) -> str:
        parent = "self_attn" if projection[0] in "qkvo" else "mlp"
        return f"model.layers.{layer}.{parent}.{projection}"


@dataclass(frozen=True)
class Declared:
    """A file as the header declares it."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """What goes over the wire: the header's name and declarations, then `data` in chunks."""

    name: str
    files: tuple[Declared, ...]
    data: bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor's header fields and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]


def config(rank: int = 4, targets: Any = ("q_proj", "v_proj"), **changes: Any) -> bytes:
    """adapter_config.json as PEFT would write it."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": "base",
    }
    return json.dumps({**fields, **changes}).encode()


def tensors(
    shape: Shape,
    rank: int = 4,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    dtype: str = "F32",
    seed: int = 0,
) -> Tensors:
    """A and B of each target in each layer, of small random numbers."""
    random = np.random.default_rng(seed)
    found = {}
    for layer in range(shape.num_layers):
        for target in targets:
            in_features, out_features = shape.features[target]
            for matrix, size in (("A", (rank, in_features)), ("B", (out_features, rank))):
                values = random.normal(0, 0.02, size).astype(np.float32)
                name = f"base_model.model.{shape.module(target, layer)}.lora_{matrix}.weight"
                found[name] = Tensor(dtype, size, _cast(values, dtype))
    return found


def _cast(values: Any, dtype: str) -> bytes:
    if dtype == "BF16":
        return bytes((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    return bytes(values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes())


def header_of(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """The safetensors header of tensors laid one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in parts.items():
        end = at + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    return header


def pack(header: Any, data: bytes) -> bytes:
    """A safetensors file of that header, given as JSON value or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def weights(parts: Tensors) -> bytes:
    """A safetensors file of these tensors."""
    return pack(header_of(parts), b"".join(tensor.data for tensor in parts.values()))


def upload(config_data: bytes, weights_data: bytes, name: str = "adapter") -> Upload:
    """The upload of two files, declared truly."""
    files = ((CONFIG, config_data), (WEIGHTS, weights_data))
    declared = tuple(Declared(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in files)
    return Upload(name, declared, config_data + weights_data)


def good_upload(
    shape: Shape, name: str = "adapter", rank: int = 4, seed: int = 0, dtype: str = "F32"
) -> Upload:
    """An upload without fault; another `seed` gives other bytes."""
    return upload(config(rank), weights(tensors(shape, rank, dtype=dtype, seed=seed)), name)
