"""Tiny models of every family in transformers and PEFT, and the engine that serves them."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from granatum.models.base_model import BaseModel
from granatum.models.config import read_config
from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.images.image import ImageShape, build_image
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.execution.executor import Executor
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.adapter_loader import AdapterLoader, MemoryImages
from granatum.runner.model.arena import allocate_arena, allocate_table, page_tokens
from granatum.runner.model.decoder import Model
from granatum.runner.model.weights import load_weights
from granatum.runner.pages import PagePool
from granatum.runner.records import SequenceNews, Submit, TokenLogprobs

CPU = torch.device("cpu")
VOCAB = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama_mha": (LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
    "llama_gqa_tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama3_rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=_LLAMA3)),
    "llama_linear_rope_biases": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        ),
    ),
    "llama_head_dim": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=24)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "qwen3_bias": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, attention_bias=True)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES, pad_token_id=None)),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig(
            **SIZES,
            embedding_multiplier=3.0,
            residual_multiplier=0.22,
            attention_multiplier=0.4,
            logits_scaling=3.0,
        ),
    ),
    "granite_biases_tied": (
        GraniteForCausalLM,
        GraniteConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            embedding_multiplier=0.7,
            residual_multiplier=1.5,
        ),
    ),
}


def make_model(directory: Path, family: str) -> PreTrainedModel:
    """A random model of the family, saved in `directory`."""
    return make_model_of(directory, *FAMILIES[family])


def make_model_of(directory: Path, kind: Any, config: Any) -> PreTrainedModel:
    """A random model of a class of transformers, saved in `directory`."""
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:  # not their neutral start
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model


def make_adapters(
    model: PreTrainedModel, configs: dict[str, LoraConfig], directory: Path
) -> PeftModel:
    """The model with random adapters by name, each saved in `directory/name`."""
    torch.manual_seed(1)
    first, *rest = configs
    tuned = get_peft_model(model, configs[first], adapter_name=first)
    for name in rest:
        tuned.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    tuned.eval()
    for name in configs:
        tuned.save_pretrained(str(directory), selected_adapters=[name])
    return tuned


def reference_logits(model: Any, adapter: str | None, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of transformers and PEFT."""
    bare = adapter is None and isinstance(model, PeftModel)
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad(), model.disable_adapter() if bare else nullcontext():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@dataclass
class Told:
    """What an engine said of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    outcome: Any = None


class TinyEngine:
    """The real engine on a saved model, with adapters from `directory/name` by name."""

    def __init__(
        self,
        model: Path,
        adapters: Path | None = None,
        names: Iterable[str] = (),
        huge: Iterable[str] = (),
        **changes: int,
    ) -> None:
        """`huge`: the adapters with numbers of 1e30, which no image that is built would have."""
        torch.set_num_threads(1)  # as the engine's process does on a CPU
        config = read_config(model)
        pages = changes.pop("pages", 64)
        rank = changes.pop("max_rank", 256)
        tokens = page_tokens(config, rank)
        bounds = EngineLimits(16, 10_000, 64, tokens, config.context[0])
        limits = replace(bounds, **changes)
        arena = allocate_arena(config, tokens, pages, torch.float32, CPU)
        self.pool = PagePool(pages)
        table = allocate_table(config, 32, CPU, rank)
        shape = ImageShape(BaseModel.from_config(model), "float32", arena.kv.page_elements)
        images = {n: build_image(adapters / n, shape) for n in names} if adapters else {}
        for name in huge:
            images[name].pages.fill(1e30)
        host_cache_bytes = (1 + sum(len(i.pages) for i in images.values())) * shape.page_bytes
        self.loader = AdapterLoader(arena.pages, table, MemoryImages(images), host_cache_bytes)
        self.cache = AdapterCache(self.pool, self.loader, 32)
        weights = load_weights(config, model, torch.float32, CPU)
        self.model = Model(config, weights, arena, table, limits)
        self.engine = Engine(Executor(self.model, limits), limits, self.pool, self.cache)
        self.told: dict[int, Told] = {}

    def submit(self, submit: Submit) -> None:
        self.told[submit.sequence_id] = Told()
        self.engine.submit(submit)

    def step(self) -> list[SequenceNews]:
        news = self.engine.step()
        for item in news:
            told = self.told[item.sequence_id]
            assert told.outcome is None, "news after the last"
            told.tokens += item.tokens
            told.logprobs += item.logprobs
            told.outcome = item.outcome
        return news

    def run(self, *submits: Submit) -> dict[int, Told]:
        for submit in submits:
            self.submit(submit)
        while self.engine.busy:
            self.step()
        return self.told

    def assert_empty(self) -> None:
        self.cache.reclaim(self.engine.figures.reclaimable_pages)
        assert self.pool.free_pages == self.pool.total

    def close(self) -> None:
        self.loader.close()
