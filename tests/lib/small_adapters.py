"""A base model without weights, and random adapters of it as PEFT would save them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from granatum.models.base_model import BaseModel

INNER, HIDDEN, KV = 96, 64, 32
BASE = BaseModel(
    "test",
    3,
    {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (HIDDEN, KV),
        "v_proj": (HIDDEN, KV),
        "o_proj": (HIDDEN, HIDDEN),
        "gate_proj": (HIDDEN, INNER),
        "up_proj": (HIDDEN, INNER),
        "down_proj": (INNER, HIDDEN),
    },
    "f" * 64,
)
Tensors = dict[str, torch.Tensor]


def digest_of(number: int) -> str:
    return f"{number:064x}"


def write_adapter(directory: Path, seed: int, rank: int, targets: list[str]) -> Tensors:
    """PEFT's two files of a random adapter, by hand."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(BASE.num_layers):
        for name in targets:
            inputs, outputs = BASE.features[name]
            prefix = f"base_model.model.{BASE.module_name(layer, name)}"
            a, b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
            tensors[a] = torch.randn(rank, inputs, generator=generator).half()
            tensors[b] = torch.randn(outputs, rank, generator=generator).half()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors
