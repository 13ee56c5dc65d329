"""An adapter's folder, as trainers write it, and what its upload says of chats."""

import json
from pathlib import Path
from typing import Any

import pytest

from granatum.client.chat_files import chat_settings
from granatum.examples.tokenizer import byte_tokenizer
from granatum.v1.errors import InvalidRequest


def written(directory: Path, **files: Any) -> Any:
    for name, fields in files.items():
        (directory / f"{name}.json").write_text(json.dumps(fields))
    settings = chat_settings(directory)
    return settings and json.loads(settings)


def test_a_folder_without_tokenizer_files_says_nothing(tmp_path: Path) -> None:
    assert written(tmp_path) is None
    assert written(tmp_path, tokenizer_config={"eos_token": None}) is None


def test_what_transformers_saves_is_found(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ größe }}\n"
    made.save_pretrained(tmp_path)
    settings = chat_settings(tmp_path)
    assert settings is not None
    assert json.loads(settings) == {"chat_template": "{{ größe }}\n", "end_tokens": ["</s>"]}


def test_older_ways_to_say_it_are_understood(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {
        "chat_template": named,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "added_tokens_decoder": {"7": {"content": "<|eot|>"}, "8": {"content": "<|im_end|>"}},
    }
    generation = {"eos_token_id": [8, 7]}
    made = written(tmp_path, tokenizer_config=config, generation_config=generation)
    assert made == {"chat_template": "d", "end_tokens": ["<|im_end|>", "<|eot|>"]}
    (tmp_path / "chat_template.jinja").write_text("j")
    assert written(tmp_path)["chat_template"] == "j"


def test_an_end_token_without_a_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="eos_token_id 9 is not among"):
        written(tmp_path, generation_config={"eos_token_id": 9})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"tokenizer_config\.json cannot be read"):
        chat_settings(tmp_path)


def test_end_tokens_are_found_where_transformers_5_keeps_them(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.save_pretrained(tmp_path)
    assert "added_tokens_decoder" not in (tmp_path / "tokenizer_config.json").read_text()
    settings = written(tmp_path, generation_config={"eos_token_id": [made.eos_token_id]})
    assert settings["end_tokens"] == ["</s>"]


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": ["a", {"name": ["default"]}], "added_tokens_decoder": [1]},
        {"chat_template": {"default": "a"}, "added_tokens_decoder": {"2": 7}},
        {"chat_template": 7, "added_tokens_decoder": "x"},
    ],
)
def test_fields_of_other_types_say_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    assert written(tmp_path, tokenizer_config=config) is None
    with pytest.raises(InvalidRequest, match="eos_token_id 2 is not among"):
        written(tmp_path, generation_config={"eos_token_id": 2}, tokenizer=[])


def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer_config\.json cannot be read"):
        written(tmp_path, tokenizer_config={"chat_template": "a\ud800"})
