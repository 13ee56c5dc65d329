"""How often a model's greedy completions are exactly what a task expects."""

import argparse
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from granatum.examples import tasks

LONGEST = 64


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tasks.BASE_MODEL)


def load_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tasks.BASE_MODEL, dtype=dtype).eval()


def load_adapters(base: LlamaForCausalLM) -> PeftModel:
    """The base with every example adapter on it; ``set_adapter(name)`` picks one."""
    first, *rest = tasks.ADAPTER_TASKS
    model = PeftModel.from_pretrained(
        base, str(first.path), first.name, autocast_adapter_dtype=False
    )
    for task in rest:
        model.load_adapter(str(task.path), task.name, autocast_adapter_dtype=False)
    return model.to(base.dtype).eval()


@torch.inference_mode()
def complete(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """Greedy completions up to the end of the sequence, stop string included."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST)
    answers = output[:, inputs["input_ids"].shape[1] :]
    completions: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return completions


def mistakes(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: tasks.Task,
    words: Sequence[str],
) -> dict[str, str]:
    """The words whose completion is not exactly the expected one, each with that completion."""
    completions = complete(model, tokenizer, [task.prompt(word) for word in words])
    return {
        word: completion
        for word, completion in zip(words, completions, strict=True)
        if completion != task.expected(word) + task.stop
    }


def measure(
    words: Sequence[str], dtype: torch.dtype
) -> Iterator[tuple[tasks.Task, dict[str, str]]]:
    """Each task with its mistakes: the plain base first, then every adapter."""
    tokenizer = load_tokenizer()
    base = load_base(dtype)
    yield tasks.BASE, mistakes(base, tokenizer, tasks.BASE, words)
    model = load_adapters(base)
    for task in tasks.ADAPTER_TASKS:
        model.set_adapter(task.name)
        yield task, mistakes(model, tokenizer, task, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=500, help="held-out words per task")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    words = tasks.held_out_words(options.words)
    for task, wrong in measure(words, getattr(torch, options.dtype)):
        print(f"{task.name:12} {1 - len(wrong) / len(words):7.2%}  {wrong or ''}", flush=True)


if __name__ == "__main__":
    main()
