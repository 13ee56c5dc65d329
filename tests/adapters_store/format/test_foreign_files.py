"""Files that another program wrote: each is called what it is, with a way out."""

from collections.abc import Callable
from typing import Any

import pytest
from adapter_files import Tensor, Upload, config, tensors, upload, weights
from uploading import BASE, SHAPE, send

from granatum.adapters_store.format.tensors import name_of_peft
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidAdapter

MODULE = "model.layers.0.self_attn.q_proj"
FIRST = f"base_model.model.{MODULE}.lora_A.weight"


def named(name: str) -> Upload:
    """Every tensor is as expected but one, which has another name."""
    parts = tensors(SHAPE)
    parts[name] = parts.pop(FIRST)
    return upload(config(), weights(parts))


def beside(name: str) -> Upload:
    parts = tensors(SHAPE)
    parts[name] = Tensor("F32", (1,), b"\0\0\0\0")
    return upload(config(), weights(parts))


def configured(**changes: Any) -> Upload:
    return upload(config(**changes), weights(tensors(SHAPE)))


FOREIGN: dict[str, tuple[Callable[[], Upload], str]] = {
    "Git LFS pointer": (
        lambda: upload(config(), b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "GGUF": (lambda: upload(config(), b"GGUF\x03" + bytes(40)), "a GGUF file: upload the PEFT"),
    "MLX's configuration": (
        lambda: upload(b'{"lora_parameters": {"scale": 20.0}}', weights(tensors(SHAPE))),
        "lora_parameters is .* granatum adapters convert",
    ),
    "MLX's names": (lambda: beside(f"{MODULE}.lora_a"), "granatum adapters convert"),
    "encoder-decoder": (lambda: configured(task_type="SEQ_2_SEQ_LM"), "task_type .*as T5"),
    "classifier": (lambda: configured(task_type="SEQ_CLS"), "task_type .*a head of its own"),
    "unknown task": (lambda: configured(task_type=["CAUSAL_LM"]), "task is not known"),
    "diffusion": (lambda: beside("unet.down_blocks.0.to_q.lora.down.weight"), "diffusion model"),
    "vision": (lambda: beside("vision_tower.layers.0.q_proj.lora_A.weight"), "vision tower"),
    "Megatron": (
        lambda: beside("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"),
        "Hugging Face's names",
    ),
    "NeMo": (
        lambda: beside(f"{MODULE}.adapter_layer.lora_kqv_adapter.linear_in.weight"),
        "Hugging Face's names",
    ),
    "torchtune": (lambda: beside("layers.0.attn.q_proj.lora_a.weight"), "torchtune wrote it"),
    "a value head": (lambda: beside("v_head.summary.weight"), "the value head of a training"),
    "a head": (lambda: beside("base_model.model.lm_head.weight"), "modules are not replaced"),
    "experts": (
        lambda: beside("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight"),
        "experts cannot be adapted",
    ),
    "a whole weight": (lambda: beside(f"{MODULE}.weight"), "upload a LoRA adapter, not a model"),
    "no known name": (
        lambda: named("lora.0.q.A"),
        f"tensor 'lora.0.q.A' would not be applied: .*; a name that is expected: {FIRST}",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
async def test_it_is_called_what_it_is(case: str) -> None:
    make, message = FOREIGN[case]
    with pytest.raises(InvalidAdapter, match=message):
        await send(AdapterStore.open("memory://", BASE), "acme", make())


@pytest.mark.parametrize(
    "name",
    [
        FIRST.replace("lora_A", "lora_B").replace("weight", "bias"),
        FIRST.replace(MODULE, "lm_head"),
        f"encoder.{FIRST}",
        f"base_model.model.vision_tower.{MODULE}.lora_A.weight",
        FIRST.replace("lora_A", "lora_A.a.b"),
        FIRST.replace("layers.0", "layers.first"),
        f"my_orig_mod.{MODULE}.lora_A.weight",
        FIRST.replace("lora_A", "lora_a"),
    ],
)
def test_a_name_that_is_not_certain_stays(name: str) -> None:
    assert name_of_peft(name) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FIRST, f"_orig_mod.{FIRST}"),
        (f"_orig_mod.{FIRST}", FIRST.replace("self_attn", "_orig_mod.self_attn")),
    ],
)
async def test_two_names_of_one_tensor_are_refused(one: str, other: str) -> None:
    parts = tensors(SHAPE)
    matrix = parts.pop(FIRST)
    made = upload(config(), weights(parts | {one: matrix, other: matrix}))
    with pytest.raises(InvalidAdapter, match=f"tensors '{one}' and '{other}' are the same one"):
        await send(AdapterStore.open("memory://", BASE), "acme", made)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("lora_A.weight", "lora_A.reference.weight"),
        ("v_proj.lora_A.weight", "v_proj.lora_A.default.weight"),
        ("base_model.model.model.layers.1.", "base_model.model.model.language_model.layers.1."),
    ],
)
async def test_halves_of_two_adapters_are_refused(part: str, other: str) -> None:
    """They fit together by their modules, but nobody trained them together."""
    parts = {name.replace(part, other): tensor for name, tensor in tensors(SHAPE).items()}
    with pytest.raises(InvalidAdapter, match="are of two adapters by their names"):
        await send(AdapterStore.open("memory://", BASE), "acme", upload(config(), weights(parts)))
