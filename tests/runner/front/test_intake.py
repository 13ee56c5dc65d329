"""Submissions prepared beside the loop: what cannot fit, what the model lacks, who waits."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import structlog
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.front.intake import INLINE_BYTES, INLINE_GENERATED, LONG_BYTES, Intake
from granatum.runner.front.submission import Prepared, SequenceBounds
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, StopConditions, TokenIds
from granatum.v1.runner_pb2 import SubmitSequence
from granatum.v1.validation import MAX_PROMPT_BYTES

PAD, BOS, EOS = 256, 257, 258
WORDS = "the quick brown fox jumps over the lazy dog, größer und schöner; "
WIDE = SequenceBounds(259, 5_000_000)


def saved(directory: Path, template: str | None = None) -> Tokenizer:
    made = byte_tokenizer()
    if template is not None:
        made.chat_template = template
    made.save_pretrained(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return saved(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def intake(tokenizer: Tokenizer) -> AsyncIterator[Intake]:
    intake = Intake(tokenizer, 259)
    yield intake
    intake.close()


def text_of(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1)).encode()[:size].decode(errors="ignore")


async def prepared(intake: Intake, request: GenerateRequest, bounds: SequenceBounds) -> Prepared:
    return await intake.prepare(1, SubmitSequence(request=request), bounds)


async def refusal(
    intake: Intake, request: GenerateRequest, bounds: SequenceBounds
) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        await prepared(intake, request, bounds)
    return refused.value


class Gaps:
    """The longest time between two turns of a thread that only wants to run."""

    def __enter__(self) -> "Gaps":
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.001):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now


@pytest.mark.parametrize("chat", [False, True])
async def test_huge_text_does_not_stop_the_process(intake: Intake, chat: bool) -> None:
    """One that even fits: it takes seconds, with the interpreter's lock it held up everybody."""
    text = text_of(MAX_PROMPT_BYTES // 2)
    request = GenerateRequest(prompt=text)
    if chat:
        request = GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content=text)]))
    with Gaps() as gaps:
        started = time.monotonic()
        made = await prepared(intake, request, WIDE)
        took = time.monotonic() - started
    assert bytes(made.submit.prompt[1:-1] if chat else made.submit.prompt[1:]) == text.encode()
    assert gaps.longest < max(0.3, took / 4)


async def test_text_that_cannot_fit_costs_what_fits(
    intake: Intake, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], Tokenizer._encoded

    def noted(self: Tokenizer, text: str, *, special: bool) -> object:
        seen.append(len(text))
        return real(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "_encoded", noted)
    request = GenerateRequest(prompt=text_of(MAX_PROMPT_BYTES))
    refused = await refusal(intake, request, SequenceBounds(259, 1000))
    assert refused.field == "prompt"
    assert "at most 999" in refused.message
    assert sum(seen) < 40_000, "most of the text is never looked at"


async def test_text_of_long_tokens_fits_though_it_has_many_characters(tmp_path: Path) -> None:
    made = FastTokenizer(models.WordLevel({"a" * 50: 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    intake = Intake(Tokenizer(tmp_path), 2)
    text = " ".join(["a" * 50] * 2000)
    made_of = await prepared(intake, GenerateRequest(prompt=text), SequenceBounds(2, 2001))
    assert made_of.submit.prompt == (0,) * 2000
    refused = await refusal(intake, GenerateRequest(prompt=text), SequenceBounds(2, 2000))
    assert "2000 tokens" in refused.message
    intake.close()


async def test_flood_of_long_texts_takes_one_thread_and_delays_no_others(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, release = 0, 0, threading.Event()
    real = Tokenizer.encode

    def counted(self: Tokenizer, text: str, at_most: int | None = None) -> list[int]:
        nonlocal running, most
        if len(text.encode()) < LONG_BYTES:
            return real(self, text, at_most)
        running += 1
        most = max(most, running)
        assert release.wait(10)
        running -= 1
        return [0]

    monkeypatch.setattr(Tokenizer, "encode", counted)
    long = GenerateRequest(prompt=text_of(LONG_BYTES + 1000))
    flood = [asyncio.create_task(prepared(intake, long, WIDE)) for _ in range(5)]
    for size in (10, INLINE_BYTES + 1):
        async with asyncio.timeout(10):
            await prepared(intake, GenerateRequest(prompt=text_of(size)), WIDE)
    assert not any(task.done() for task in flood)
    release.set()
    await asyncio.gather(*flood)
    assert most == 1


Ask = Callable[[str], GenerateRequest]
ASKS: dict[str, Ask] = {
    "prompt": lambda text: GenerateRequest(prompt=text),
    "chat.messages": lambda text: GenerateRequest(
        chat=Chat(messages=[ChatMessage(role="user", content=text)])
    ),
    "token_ids.ids": lambda _: GenerateRequest(token_ids=TokenIds(ids=[1, PAD])),
    "stop.token_ids": lambda _: GenerateRequest(
        prompt="x", stop=StopConditions(token_ids=[3, 4_000_000_000])
    ),
}


@pytest.mark.parametrize("field", ASKS)
async def test_ids_that_the_model_lacks_name_their_field(tmp_path: Path, field: str) -> None:
    """A model of 256 tokens whose tokenizer has three more."""
    intake = Intake(saved(tmp_path, "{{ messages[0]['content'] }}"), 256)
    refused = await refusal(intake, ASKS[field]("<pad> hi"), SequenceBounds(256, 100))
    assert refused.field == field
    assert "256" in refused.message
    intake.close()


async def test_end_tokens_that_the_model_lacks_end_nothing_and_are_told_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 4000000000, -1]}')
    with structlog.testing.capture_logs() as logs:
        intake = Intake(saved(tmp_path), 259)
        request = GenerateRequest(prompt="hi")
        made = [await prepared(intake, request, SequenceBounds(259, 100)) for _ in range(2)]
    assert [m.submit.stop_ids for m in made] == [{7, EOS}] * 2
    (warning,) = logs
    assert (warning["log_level"], warning["ids"]) == ("warning", [-1, 4_000_000_000])
    intake.close()


@pytest.mark.parametrize(
    ("strings", "ids"),
    [
        (["</s>"], {EOS}),
        (["x", "<pad>", "</s>"], {PAD, EOS}),
        (["</s>\n", " </s>", "</s></s>", "<|im_end|>"], set()),
    ],
)
async def test_stop_string_that_is_a_special_token_is_a_stop_id(
    intake: Intake, strings: list[str], ids: set[int]
) -> None:
    stop = StopConditions(strings=strings, token_ids=[7], ignore_eos=True)
    made = await prepared(intake, GenerateRequest(prompt="hi", stop=stop), WIDE)
    assert made.submit.stop_ids == {7, *ids}


async def test_special_token_that_the_model_lacks_is_no_stop_id(intake: Intake) -> None:
    stop = StopConditions(strings=["<pad>", "</s>"], ignore_eos=True)
    made = await prepared(intake, GenerateRequest(prompt="hi", stop=stop), SequenceBounds(258, 99))
    assert made.submit.stop_ids == {PAD}


async def test_suspicion_reaches_the_engine(intake: Intake) -> None:
    message = SubmitSequence(request=GenerateRequest(prompt="hi"), suspicion=2)
    assert (await intake.prepare(1, message, WIDE)).submit.suspicion == 2


@pytest.mark.parametrize("more", [0, 1])
async def test_streams_that_come_from_elsewhere_are_prepared_beside_the_loop(
    more: int, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost runner's streams come all at once, and each has all its tokens made text again."""
    threads: list[str] = []

    def prepare(number: int, message: SubmitSequence, *_: object) -> None:
        threads.append(threading.current_thread().name)

    monkeypatch.setattr("granatum.runner.front.intake.prepare", prepare)
    generated = [65] * (INLINE_GENERATED + more)
    message = SubmitSequence(request=GenerateRequest(prompt="a"), generated=generated)
    await intake.prepare(1, message, WIDE)
    assert (threads == [threading.main_thread().name]) == (more == 0)


async def test_given_tokens_are_those_of_the_model_and_fit_whole(intake: Intake) -> None:
    request = GenerateRequest(
        token_ids=TokenIds(ids=[1, 2, 3]), stop=StopConditions(max_tokens=5, ignore_eos=True)
    )
    bounds = SequenceBounds(259, 8)
    message = SubmitSequence(request=request, forced=[4, 258, 5, 6, 7], generated=[4, 258])
    submit = (await intake.prepare(1, message, bounds)).submit
    assert submit.forced == (4, 258, 5, 6, 7)
    assert (submit.max_tokens, submit.stop_ids) == (5, frozenset())
    for forced, word in (([4, 259], "259"), ([4] * 6, "1 tokens more")):
        wrong = SubmitSequence(request=request, forced=forced)
        with pytest.raises(InvalidRequest) as refused:
            await intake.prepare(1, wrong, bounds)
        assert refused.value.field == "forced"
        assert word in refused.value.message
