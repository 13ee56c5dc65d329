"""The committed weights do what ``tasks`` says, judged by transformers and PEFT in float32."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from granatum.examples import accuracy, tasks
from granatum.examples.corpus import PRETRAINING, Drill, batches

WORDS = tasks.held_out_words(20)
NAMES = [task.name for task in tasks.ADAPTER_TASKS]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return accuracy.load_tokenizer()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return accuracy.load_adapters(accuracy.load_base())


@pytest.mark.parametrize("task", tasks.ADAPTER_TASKS, ids=NAMES)
def test_adapter_is_right_on_unseen_words(
    task: tasks.Task, model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.set_adapter(task.name)
    assert accuracy.mistakes(model, tokenizer, task, WORDS) == {}


def test_base_echoes_and_solves_no_adapters_task(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with model.disable_adapter():
        answers = accuracy.complete(model, tokenizer, [tasks.BASE.prompt(word) for word in WORDS])
    assert answers == [word + tasks.STOP for word in WORDS]
    for task in tasks.ADAPTER_TASKS:
        assert [word for word in WORDS if task.expected(word) == word] == []


def test_adapters_are_as_declared() -> None:
    assert len({task.rank for task in tasks.ADAPTER_TASKS}) == len(tasks.ADAPTER_TASKS)
    assert len({task.tenant for task in tasks.ADAPTER_TASKS}) >= 3
    for task in tasks.ADAPTER_TASKS:
        config = PeftConfig.from_pretrained(str(task.path))
        assert config.r == task.rank
        with safe_open(task.path / "adapter_model.safetensors", "pt") as tensors:
            ranks = {tensors.get_slice(key).get_shape()[0] for key in lora_a(tensors.keys())}
        assert ranks == {task.rank, *config.rank_pattern.values()}


def lora_a(keys: list[str]) -> list[str]:
    return [key for key in keys if key.endswith("lora_A.weight")]


def test_expected_completions() -> None:
    assert {task.name: task.expected("granite") for task in tasks.ADAPTER_TASKS} == {
        "shout": "GRANITE",
        "reverse": "etinarg",
        "chant": "granite granite granite",
        "rot13": "tenavgr",
        "sort": "aeginrt",
        "count": "7 letters",
        "stutter": "ggrraanniittee",
        "consonants": "grnt",
        "stairs": "g gr gra gran grani granit granite",
    }


def test_training_never_sees_a_held_out_word(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = batches([Drill(tasks.MARK, tasks.echo)], tokenizer, seed=5)
    texts = [text for _ in range(100) for text in tokenizer.batch_decode(next(examples).ids)]
    seen = {text.removeprefix("<s>").split(tasks.MARK)[0] for text in texts}
    assert len(seen) > 5000
    assert not any(map(tasks.is_held_out, seen))
    assert all(map(tasks.is_held_out, tasks.held_out_words(2000)))


def test_held_out_words_are_deterministic_and_start_with_real_ones() -> None:
    assert tasks.held_out_words(500)[:100] == tasks.held_out_words(100)
    assert tuple(tasks.held_out_words(len(tasks.REAL_WORDS))) == tasks.REAL_WORDS


@pytest.mark.parametrize(
    "text", ["granite>", "", "  two  spaces \n", "naïve 日本語 🦀", "\x00\x7f"]
)
def test_tokenizer_gives_any_text_back(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode(text)
    assert ids == [tokenizer.bos_token_id, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_makes_the_plain_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    message = {"role": "user", "content": "granite"}
    chat = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
    assert chat == tokenizer.encode(tasks.BASE.prompt("granite"))


def test_no_adapters_prompt_has_another_mark_than_the_bases() -> None:
    marks = [drill.mark for drill in PRETRAINING]
    assert len(set(marks)) == len(marks)
    assert {task.prompt("granite") for task in tasks.ADAPTER_TASKS} == {"granite>"}


def test_tasks_import_no_torch() -> None:
    code = "import sys, granatum.examples.tasks; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
