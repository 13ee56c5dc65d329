"""SmolLM2-135M-Instruct through a box, as `granatum up` runs it, against transformers and PEFT.

It runs where the package with the model is installed: `pip install --group real`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from granatum.cli.box.box import Box
from granatum.cli.box.layout import Layout
from granatum.client.client import Client
from granatum.client.records import Completion
from granatum.client.requests import Message, Options, Prompt
from granatum.examples import smollm2

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (find_spec(smollm2.PACKAGE) and find_spec("gguf")),
        reason="the model is not installed: pip install --group real",
    ),
]

RANKS = (1, 4, 8, 16, 64, 256)
TOKENS = 16
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
LONG = "The caravan moved on at dawn, and the well was counted twice before the gate closed. " * 84
TEXTS = (
    "Once upon a time",
    "The capital of France is",
    "1. Apples\n2. Pears\n3.",
    "12345 + 67890 =",
    "In 1969, 3 astronauts flew 384,400 km to",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n\t\t",
    "SELECT name, COUNT(*) FROM users WHERE created_at > '2024-01-01'",
    '{"name": "granite", "size": 3, "tags": ["a", "b"',
    "🌋🌍 The volcano 👩‍🚀 said:",
    "Zürich, Ærø, naïve café — “quotes” …",
    "日本の首都は",
    "مرحبا بالعالم",
    " leading blank",
    "trailing blank ",
    "a\n\n\n\nb\t\tc",
    "x" * 300,
    LONG,
    "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n",
    "\\frac{1}{2} + \\sqrt{3} =",
)
CHATS = (
    ((USER, "Hello!"),),
    ((USER, "Name three colours."),),
    ((SYSTEM, "Answer in one word."), (USER, "Is water wet?")),
    ((USER, "Write a haiku about 2 rivers and 10 stones."),),
    ((USER, "Reverse a list in Python."),),
    ((USER, "Hi"), (ASSISTANT, "Hello! How can I help?"), (USER, "What is 17 + 25?")),
    ((USER, "My name is Ada."), (ASSISTANT, "Nice to meet you."), (USER, "What is my name?")),
    ((USER, "🎉 Party?"), (ASSISTANT, "🎈 Yes!"), (USER, "When? 🕗")),
    ((SYSTEM, "You are a pirate."), (USER, "Where is the treasure?")),
    ((USER, "Summarise: " + LONG[:2000]),),
)


@dataclass(frozen=True)
class Case:
    """A prompt, who answers it, and its token ids by `tokenizers` and transformers."""

    prompt: Prompt
    adapter: str | None
    ids: list[int]


@dataclass(frozen=True)
class Real:
    """The model's folder, PEFT's model with every adapter, the adapters' folder, the cases."""

    folder: Path
    reference: Any
    adapters: Path
    cases: tuple[Case, ...]

    def logits(self, adapter: str | None, tokens: list[int]) -> torch.Tensor:
        """Logits [tokens, vocab]."""
        if adapter is not None:
            self.reference.set_adapter(adapter)
        bare = self.reference.disable_adapter() if adapter is None else nullcontext()
        with torch.no_grad(), bare:
            found: torch.Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    place = tmp_path_factory.mktemp("smollm2")
    smollm2.make(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    torch.manual_seed(0)
    tuned: Any = model
    for rank in RANKS:
        name, config = f"r{rank}", LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        if tuned is model:
            tuned = get_peft_model(model, config, adapter_name=name)
        else:
            tuned.add_adapter(name, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:  # A has PEFT's own start
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.eval().save_pretrained(str(place / "adapters"))
    return Real(place / "model", tuned, place / "adapters", tuple(cases(place / "model")))


def cases(folder: Path) -> Iterator[Case]:
    """Every prompt; base rows and adapters of all ranks in turn."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = AutoTokenizer.from_pretrained(folder)
    users = (None, *(f"r{rank}" for rank in RANKS))
    for number, text in enumerate(TEXTS):
        yield Case(text, users[number % len(users)], tokenizer.encode(text).ids)
    for number, turns in enumerate(CHATS):
        fields = [{"role": role, "content": content} for role, content in turns]
        text = template.apply_chat_template(fields, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        chat = [Message(role, content) for role, content in turns]
        yield Case(chat, users[(number + 3) % len(users)], ids)


@pytest.fixture
async def box(real: Real, tmp_path: Path) -> AsyncIterator[Box]:
    sizes = ("--max-context", "2048", "--max-batch", "32", "--arena-bytes", str(3 << 30))
    arguments = ("--device", "cpu", "--max-rank", "256", *sizes)
    layout = Layout(real.folder, tmp_path / "state", runners=1, runner_arguments=arguments)
    async with Box(layout, print) as box:
        yield box


async def test_thirty_prompts_in_one_batch(real: Real, box: Box) -> None:
    async with Client(box.address, key=box.keys["default"], timeout=1500) as client:
        for rank in RANKS:
            await client.upload(f"r{rank}", real.adapters / f"r{rank}")

        async def ask(case: Case) -> Completion:
            options = Options(max_tokens=TOKENS, ignore_eos=True, logprobs=5)
            if case.adapter is not None:
                options["adapter"] = case.adapter
            return await client.complete(case.prompt, **options)

        answers = await asyncio.gather(*map(ask, real.cases))
    furthest = max(
        distance(real, case, answer) for case, answer in zip(real.cases, answers, strict=True)
    )
    print(f"{len(answers)} prompts, log probabilities within {furthest:.1e}")
    assert furthest < 1e-3


def distance(real: Real, case: Case, answer: Completion) -> float:
    """The largest difference of a log probability; every token must be the likeliest one."""
    assert answer.end.prompt_tokens == len(case.ids), case.prompt
    tokens = [token.id for token in answer.tokens]
    logits = real.logits(case.adapter, [*case.ids, *tokens])[len(case.ids) - 1 : -1]
    assert tokens == logits.argmax(1).tolist(), (case.prompt, case.adapter)
    expected = logits.log_softmax(1)
    furthest = 0.0
    for token, row in zip(answer.tokens, expected, strict=True):
        assert token.logprob is not None
        told = [(token.id, token.logprob), *((top, value) for top, value, _ in token.top)]
        furthest = max(furthest, *(abs(value - float(row[at])) for at, value in told))
    return furthest
