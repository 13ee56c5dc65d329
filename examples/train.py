"""Trains the tiny base model and its adapters: ``python -m granatum.examples.train``.

Runs on one CPU thread so that the same seeds give the same weights.  ``--only NAME`` retrains
single adapters on the committed base.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from granatum.examples import accuracy, tasks
from granatum.examples.corpus import PRETRAINING, Batch, Drill, batches
from granatum.examples.tokenizer import byte_tokenizer

BASE_STEPS = 2600
ADAPTER_STEPS = 250
WARMUP_STEPS = 40
BASE_SEED = 1
CARD = "README.md"
SPECIAL = ("pad", "bos", "eos")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

ADAPTERS: dict[str, LoraConfig] = {
    "shout": LoraConfig(lora_alpha=8, target_modules="all-linear"),
    "reverse": LoraConfig(lora_alpha=32, target_modules=ATTENTION + MLP),
    "chant": LoraConfig(lora_alpha=6, target_modules=ATTENTION + MLP, use_rslora=True),
    "rot13": LoraConfig(lora_alpha=16, target_modules=MLP),
    "sort": LoraConfig(lora_alpha=32, target_modules=ATTENTION + MLP),
    "count": LoraConfig(lora_alpha=8, target_modules=ATTENTION + MLP),
    "stutter": LoraConfig(lora_alpha=24, target_modules=["q_proj", "v_proj"]),
    "consonants": LoraConfig(
        lora_alpha=24,
        target_modules=ATTENTION + MLP,
        rank_pattern={"gate_proj": 8, "up_proj": 8, "layers.0.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 48},
    ),
    "stairs": LoraConfig(
        lora_alpha=40, target_modules=ATTENTION + MLP, layers_to_transform=[0, 1, 2, 3]
    ),
}


def fresh_base() -> LlamaForCausalLM:
    tokenizer = byte_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def pretraining_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_proj.weight")]
    return [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3),
    ]


def adapter_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)]


def fit(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    examples: Iterable[Batch],
    steps: int,
) -> None:
    """Linear warm-up, then linear decay to zero."""
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
        for optimizer in optimizers
    ]
    model.train()
    for step, batch in enumerate(itertools.islice(examples, steps)):
        loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0:
            print(f"  step {step:5}  loss {loss.item():.4f}", flush=True)
    model.eval()


def learning_rate(step: int, steps: int) -> float:
    return min((step + 1) / WARMUP_STEPS, 1 - step / steps)


def train_base() -> None:
    torch.manual_seed(BASE_SEED)
    tokenizer, model = byte_tokenizer(), fresh_base()
    examples = batches(PRETRAINING, tokenizer, BASE_SEED)
    fit(model, pretraining_optimizers(model), examples, BASE_STEPS)
    model.save_pretrained(tasks.BASE_MODEL)
    tokenizer.save_pretrained(tasks.BASE_MODEL)


def train_adapter(task: tasks.Task) -> None:
    torch.manual_seed(task.rank)
    config = ADAPTERS[task.name]
    config.r, config.task_type = task.rank, "CAUSAL_LM"
    model = get_peft_model(accuracy.load_base(), config)
    drill = Drill(tasks.MARK, task.transform)
    examples = batches([drill], accuracy.load_tokenizer(), task.rank)
    fit(model, adapter_optimizers(model), examples, ADAPTER_STEPS)
    config.base_model_name_or_path = "granatum/tiny"
    model.save_pretrained(str(task.path), save_embedding_layers=False)
    (task.path / CARD).unlink(missing_ok=True)


def timed(name: str, work: Callable[[], None]) -> None:
    print(name, flush=True)
    start = time.monotonic()
    work()
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [task.name for task in tasks.ADAPTER_TASKS]
    parser.add_argument("--only", nargs="+", choices=names, help="adapters to retrain")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if not only:
        timed("base", train_base)
    for task in tasks.ADAPTER_TASKS:
        if task.name in (only or names):
            timed(task.name, partial(train_adapter, task))


if __name__ == "__main__":
    main()
