"""Tokenizers of every kind that models bring, against the tokenizers library on tokenizer.json."""

import random
from itertools import groupby
from pathlib import Path

import pytest
from chats import chat_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, write_tokenizer
from tokenizers import Tokenizer as FileTokenizer

from granatum.runner.text.detokenizer import Detokenizer
from granatum.runner.text.tokenizer import Tokenizer

PIECES = [
    *[
        "the cat",
        " ",
        "  ",
        "\n",
        "12345",
        "7",
        "größer",
        "é",
        "e\u0301",
        "東京",
        "😀",
        "x",
        "SAT ON",
    ],
    *["<s>", "</s>", "[INST]", "<|start|>", "<|end|>", "<tool>", "<left>", "<right>", "<both>"],
    *["<word>", "<unk>", "▁", "Ġ", "def f(x):", "\u200b", "<0x41>"],
]
TEXTS = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def file(folder: Path) -> FileTokenizer:
    return FileTokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_texts_and_chats_are_encoded_as_the_file_says(
    ours: Tokenizer, file: FileTokenizer, text: str
) -> None:
    assert ours.encode(text) == file.encode(text).ids
    (end,) = ours.end_ids
    chat = f"{text}{file.id_to_token(end)}\n"
    assert (
        ours.encode_chat(chat_of(("user", text))) == file.encode(chat, add_special_tokens=False).ids
    )


def test_any_ids_are_decoded_as_the_file_says(ours: Tokenizer, file: FileTokenizer) -> None:
    rng = random.Random(0)
    assert ours.size == file.get_vocab_size()
    for _ in range(300):
        ids = ids_of(rng, ours, 20)
        assert ours.decode(ids) == file.decode(ids)
        assert ours.decode(ids, special=True) == file.decode(ids, skip_special_tokens=False)


def test_streams_of_any_ids_are_the_decoding_of_all(ours: Tokenizer, file: FileTokenizer) -> None:
    """After prompts of any ids. A prompt that ends within a character is no prefix of the whole."""
    rng, compared = random.Random(0), 0
    for _ in range(700):
        prompt, ids = ids_of(rng, ours, 12), ids_of(rng, ours, 20)
        before, after = file.decode(prompt), file.decode(prompt + ids)
        if not after.startswith(before) or garbles(file, prompt + ids, ours.special_ids):
            continue
        detokenizer = Detokenizer(ours, prompt)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == after[len(before) :], (prompt, ids)
        compared += 1
    assert compared > 300


def ids_of(rng: random.Random, tokenizer: Tokenizer, most: int) -> list[int]:
    """Ids of the whole vocabulary; special ones are as frequent as all others together."""
    special, half = sorted(tokenizer.special_ids), rng.random() < 0.5
    count = rng.randint(0, most)
    return [
        rng.choice(special) if half and rng.random() < 0.5 else rng.randrange(tokenizer.size)
        for _ in range(count)
    ]


def garbles(file: FileTokenizer, ids: list[int], special: frozenset[int]) -> bool:
    """Whether a run of byte tokens has a whole character, and is spoilt by a later byte.

    A byte-fallback decoder then takes back the character, which a stream has given already.
    """
    tokens = [file.id_to_token(token) or "" for token in ids if token not in special]
    runs = groupby(tokens, lambda token: token.startswith("<0x") and len(token) == 6)
    for is_bytes, run in runs:
        data = bytes(int(token[3:5], 16) for token in run) if is_bytes else b""
        whole = [is_text(data[:end]) for end in range(1, len(data) + 1)]
        if any(whole) and not whole[-1]:
            return True
    return False


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "text", "tokens"),
    [
        ("LlamaTokenizer", "<s>[INST] hi", ["<s>", "<s>", "▁[INST]", "▁hi"]),
        ("LlamaTokenizer", " one space", ["<s>", "▁", "▁one", "▁space"]),
        ("LlamaTokenizer", "one space", ["<s>", "▁one", "▁space"]),
        ("GPT2Tokenizer with digits", "12345 + x", ["1", "2", "3", "4", "5", "Ġ+", "Ġx"]),
        ("GPT2Tokenizer with prefix", "the cat", ["Ġthe", "Ġcat"]),
        ("Qwen2Tokenizer", "12345", ["123", "45"]),
    ],
)
def test_what_a_rebuilt_tokenizer_loses(
    tmp_path: Path, kind: str, text: str, tokens: list[str]
) -> None:
    folder = write_tokenizer(kind, tmp_path)
    made = FileTokenizer.from_file(str(folder / "tokenizer.json"))
    assert [made.id_to_token(token) for token in Tokenizer(folder).encode(text)] == tokens


def test_a_chat_keeps_the_blank_after_an_end_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer("LlamaTokenizer", tmp_path))
    ids = tokenizer.encode_chat(chat_of(("user", "hi</s> there")))
    assert tokenizer.decode(ids, special=True) == "hi</s>  there</s> \n"
