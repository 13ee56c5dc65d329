"""Reading checkpoints: sharded or not, and what is wrong with one by name."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CPU, make_model
from transformers import AutoModelForCausalLM

from granatum.models.config import read_config
from granatum.runner.model.weights import load_weights, random_weights, targets
from granatum.v1.errors import InvalidRequest


def test_fused_and_sharded(tmp_path: Path) -> None:
    model = make_model(tmp_path / "whole", "qwen2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    config = read_config(tmp_path / "whole")
    for directory in ("whole", "shards"):
        weights = load_weights(config, tmp_path / directory, torch.float32, CPU)
        found = dict(targets(config, weights))
        expected = {n: t for n, t in model.state_dict().items() if n in found}
        assert len(expected) == len(found)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
    attention = model.model.layers[1].self_attn
    stacked = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(weights.layers[1].qkv.weight, torch.cat(stacked))


def test_the_embedding_is_the_head_if_they_are_tied(tmp_path: Path) -> None:
    make_model(tmp_path, "llama_gqa_tied")
    weights = load_weights(read_config(tmp_path), tmp_path, torch.bfloat16, CPU)
    assert weights.head.weight is weights.embedding
    assert weights.embedding.dtype is torch.bfloat16


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    make_model(tmp_path, "llama_mha")
    config, file = read_config(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != norm}, f"lacks 1 tensors, such as {norm}"),
        ({**tensors, "model.extra": torch.zeros(1)}, "model.extra, .* no place for$"),
        ({**tensors, "model.extra.qweight": torch.zeros(1)}, "no place for: its weights are quant"),
        ({**tensors, f"{norm}_scale_inv": torch.ones(1)}, "its weights are quantised"),
        ({**tensors, norm: torch.zeros(9, 1, dtype=torch.uint8)}, "is of torch.uint8: give .* in"),
        ({**tensors, norm: torch.zeros(3)}, rf"{norm} has shape \(3,\), not \(64,\)"),
        ({**tensors, norm: torch.zeros(64, dtype=torch.int8)}, f"{norm} is of torch.int8"),
    ):
        save_file(changed, file)
        with pytest.raises(InvalidRequest, match=message):
            load_weights(config, tmp_path, torch.float32, CPU)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    """As where one shard was downloaded under the name of another."""
    make_model(tmp_path, "llama_mha").save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    shutil.copy(first, second)
    with pytest.raises(InvalidRequest, match=f"{second.name} holds .*, which another file held"):
        load_weights(read_config(tmp_path), tmp_path, torch.float32, CPU)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_model(tmp_path, "llama_mha")
    config, file = read_config(tmp_path), tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors cannot be read .* download"):
        load_weights(config, tmp_path, torch.float32, CPU)


def test_a_head_of_its_own_is_not_dropped(tmp_path: Path) -> None:
    """transformers does not tie such a head."""
    make_model(tmp_path, "llama_gqa_tied")
    config, file = read_config(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    assert load_weights(config, tmp_path, torch.float32, CPU).head.weight.equal(embedding)
    save_file({**tensors, "lm_head.weight": embedding + 1}, file)
    with pytest.raises(InvalidRequest, match=r"tie_word_embeddings, but lm_head\.weight differs"):
        load_weights(config, tmp_path, torch.float32, CPU)


def test_tied_weights_stored_as_the_head_alone(tmp_path: Path) -> None:
    """As transformers reads them."""
    make_model(tmp_path, "llama_gqa_tied")
    config, file = read_config(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, file)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight
    assert load_weights(config, tmp_path, torch.float32, CPU).embedding.equal(theirs)


def test_random_weights(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen3")
    config = read_config(tmp_path)
    weights = random_weights(config, torch.float32, CPU)
    assert weights.layers[0].gate_up.weight.std() == pytest.approx(0.02, rel=0.05)
    assert weights.norm.mean() == pytest.approx(1.0, abs=0.02)
