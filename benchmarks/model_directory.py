"""Directories as Hugging Face and PEFT write them, of any shape, with nothing learned in them."""

import itertools
import json
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from granatum.models.base_model import BaseModel
from granatum.models.config import ModelConfig

_SPECIAL = ("<s>", "</s>")
_SPACE = "\u0120"
"""How byte-level vocabularies write a space."""


def write_model(directory: Path, config: ModelConfig) -> Path:
    """A Llama's config.json and a tokenizer for its vocabulary; there are no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_config(config), indent=1))
    _tokenizer(config.vocab).save_pretrained(directory)
    return directory


def write_adapter(directory: Path, base: BaseModel, rank: int, seed: int) -> Path:
    """A PEFT adapter of `rank` on every module, of random numbers, in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(base.num_layers):
        for name in base.modules:
            inner, outer = base.module_features(name)
            prefix = f"base_model.model.{base.module_name(layer, name)}.lora_"
            for matrix, shape in (("A", (rank, inner)), ("B", (outer, rank))):
                values = torch.empty(shape, dtype=torch.bfloat16)
                values.uniform_(-0.03, 0.03, generator=generator)
                tensors[f"{prefix}{matrix}.weight"] = values
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(base.modules),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _config(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": config.rope.settings,
        "tie_word_embeddings": config.tied,
    }


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The bytes, the special tokens, and made-up words, so that text is as long as real text."""
    symbols = [*bytes_to_unicode().values()]
    words = itertools.islice(_words(), size - len(symbols) - len(_SPECIAL))
    vocabulary = {token: number for number, token in enumerate([*symbols, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    start, end = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end)


def _words() -> itertools.chain[str]:
    lengths = (itertools.product(string.ascii_lowercase, repeat=n) for n in itertools.count(3))
    return itertools.chain.from_iterable((_SPACE + "".join(w) for w in words) for words in lengths)
