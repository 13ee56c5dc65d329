"""What a model folder's files say of its tokenizer, and what is said of damaged ones."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from small_tokenizers import write_tokenizer
from tokenizers import Tokenizer as FileTokenizer
from transformers import PreTrainedTokenizerFast

from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.errors import InvalidRequest, PreconditionFailed

KIND = "PreTrainedTokenizerFast"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
TEXTS = [
    "the <x> cat",
    "<s>hi <x>",
    "mat<|end|> <pad>12345",
    "[TOOL] [TOOL]x<x><y> <z>",
    "<|START|>",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(KIND, tmp_path)


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def token(content: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **off, **flags}


def config_adds(folder: Path) -> None:
    """As after an addition of tokens by a trainer that leaves tokenizer.json alone."""
    file = FileTokenizer.from_file(str(folder / "tokenizer.json"))
    size = file.get_vocab_size()
    change(
        folder / "tokenizer_config.json",
        added_tokens_decoder={
            str(file.token_to_id("<|end|>")): token("<|end|>", special=True),
            str(size): token("<x>", special=True, lstrip=True),
            str(size + 1): token("[TOOL]", rstrip=True, normalized=True),
        },
        pad_token="<pad>",
        additional_special_tokens=["<y>", "<x>"],
    )


def config_makes_special(folder: Path) -> None:
    """A token that tokenizer.json has as an ordinary one."""
    file = FileTokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_tokens(["<x>"])
    file.save(str(folder / "tokenizer.json"))
    number = str(file.token_to_id("<x>"))
    change(
        folder / "tokenizer_config.json",
        added_tokens_decoder={number: token("<x>", special=True, rstrip=True)},
    )


def map_adds(folder: Path) -> None:
    file = folder / "special_tokens_map.json"
    file.write_text(json.dumps({"pad_token": token("<pad>"), "additional_special_tokens": ["<y>"]}))


def old_file_adds(folder: Path) -> None:
    size = FileTokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": size, "<z>": size + 1}))
    map_adds(folder)


def text_stays_text(folder: Path) -> None:
    change(folder / "tokenizer_config.json", split_special_tokens=True)


@pytest.mark.parametrize(
    "alter", [config_adds, config_makes_special, map_adds, old_file_adds, text_stays_text]
)
def test_tokens_beside_the_file_are_those_of_transformers(
    folder: Path, alter: Callable[[Path], None]
) -> None:
    before = Tokenizer(folder)
    alter(folder)
    ours = Tokenizer(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    assert len(theirs) == ours.size
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, special=True) == theirs.decode(ids)
    assert any(ours.encode(text) != before.encode(text) for text in TEXTS)


def test_settings_of_cutting_and_filling_mean_nothing_here(folder: Path) -> None:
    file = FileTokenizer.from_file(str(folder / "tokenizer.json"))
    whole = file.encode("the cat sat on the mat").ids
    file.enable_truncation(2)
    file.enable_padding(length=50)
    file.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).encode("the cat sat on the mat") == whole


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b'{"version": "1.0", "model": {"type": "BPE"', "cannot be read as a tokenizer"),
        (b"\xff\xfe\x00", "cannot be read as a tokenizer"),
        (b"[]", "cannot be read as a tokenizer"),
        (POINTER, "is a Git LFS pointer.*run `git lfs pull`"),
    ],
)
def test_damaged_file_is_named(folder: Path, content: bytes, said: str) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises((PreconditionFailed, InvalidRequest), match=said) as refused:
        Tokenizer(folder)
    assert str(folder / "tokenizer.json") in refused.value.message


def test_file_that_is_cut_short_is_named(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    for part in (10, len(whole) // 2, len(whole) - 2):
        (folder / "tokenizer.json").write_bytes(whole[:part])
        with pytest.raises(PreconditionFailed, match=r"tokenizer\.json cannot be read"):
            Tokenizer(folder)


@pytest.mark.parametrize(
    "broken",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_file_at_which_the_library_panics_is_named(folder: Path, broken: dict[str, Any]) -> None:
    change(folder / "tokenizer.json", **broken)
    with pytest.raises(PreconditionFailed, match=r"tokenizer\.json cannot be read.*panicked"):
        Tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("content", [b"{", POINTER, b"[]", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_named(folder: Path, name: str, content: bytes) -> None:
    (folder / f"{name}.json").write_bytes(content)
    said = rf"{name}\.json (cannot be read|is not|is a Git LFS pointer)"
    with pytest.raises((PreconditionFailed, InvalidRequest), match=said):
        Tokenizer(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"9": "no token"}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"nine": {"content": "x"}}},
    ],
)
def test_settings_that_mean_nothing_are_refused(folder: Path, settings: dict[str, Any]) -> None:
    change(folder / "tokenizer_config.json", **settings)
    with pytest.raises(PreconditionFailed, match=r"tokenizer_config\.json"):
        Tokenizer(folder)


@pytest.mark.parametrize("others", [[], ["vocab.json", "merges.txt"]])
def test_folder_without_the_file_says_so(tmp_path: Path, others: list[str]) -> None:
    """Vocabulary and merges do not say how texts are split."""
    for name in others:
        (tmp_path / name).write_text("{}")
    with pytest.raises(PreconditionFailed, match=r"holds no tokenizer\.json: take the file"):
        Tokenizer(tmp_path)


def test_folder_of_sentencepiece_says_how_to_make_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(PreconditionFailed, match=r"holds no tokenizer\.json: make one") as refused:
        Tokenizer(tmp_path)
    assert "tiktoken" not in refused.value.message
    command = refused.value.message.split("python -c ")[1]
    compile(shlex.split(command)[0], "", "exec")
    assert f"from_pretrained({str(tmp_path)!r}).save_pretrained({str(tmp_path)!r})" in command


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, []),
        ({"add_bos_token": True, "add_eos_token": False}, []),
        ({"add_bos_token": None}, []),
        ({"add_bos_token": False}, ["add_bos_token"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["add_eos_token"]),
    ],
)
def test_the_file_says_what_stands_around_a_prompt(
    folder: Path, settings: dict[str, Any], warned: list[str]
) -> None:
    change(folder / "tokenizer_config.json", **settings)
    file = FileTokenizer.from_file(str(folder / "tokenizer.json"))
    with structlog.testing.capture_logs() as logs:
        ours = Tokenizer(folder)
    assert ours.encode("hi") == [file.token_to_id("<|start|>"), *file.encode("hi").ids[1:]]
    assert [entry["field"] for entry in logs] == warned
