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


def test_the_end_tokens_of_a_folder_by_transformers_5_are_found(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    made.save_pretrained(tmp_path)
    ends = [made.convert_tokens_to_ids("<|eot|>"), made.eos_token_id]
    assert written(tmp_path, generation_config={"eos_token_id": ends}) == {
        "chat_template": made.chat_template or "",
        "end_tokens": ["</s>", "<|eot|>"],
    }


@pytest.mark.parametrize("template", [["x"], [{"name": []}], [None], 5])
def test_a_template_in_no_known_form_is_none(template: Any, tmp_path: Path) -> None:
    assert written(tmp_path, tokenizer_config={"chat_template": template}) is None


def test_half_a_character_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer_config\.json cannot be read"):
        written(tmp_path, tokenizer_config={"eos_token": "\ud800"})


def test_older_ways_to_say_it_are_understood(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {
        "chat_template": named,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "added_tokens_decoder": {"7": {"content": "<|eot|>"}, "8": {"content": "<|im_end|>"}},
    }
    generation = {"eos_token_id": [8, 7]}
    made = written(tmp_path, tokenizer_config=config, generation_config=generation)
    assert made["end_tokens"] == ["<|im_end|>", "<|eot|>"]
    (tmp_path / "chat_template.jinja").write_text("j")
    assert written(tmp_path)["chat_template"] == "j"


@pytest.mark.parametrize("known", [[], {"9": 5}, None])
def test_an_end_token_without_a_text_is_named(known: Any, tmp_path: Path) -> None:
    settings, generation = {"added_tokens_decoder": known}, {"eos_token_id": 9}
    with pytest.raises(InvalidRequest, match="eos_token_id 9 is not among"):
        written(tmp_path, tokenizer_config=settings, generation_config=generation)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"tokenizer_config\.json cannot be read"):
        chat_settings(tmp_path)


@pytest.mark.parametrize("template", [["x", {"name": ["default"], "template": 1}, None], {"a": 1}])
def test_what_names_no_template_is_none(tmp_path: Path, template: Any) -> None:
    config = {"chat_template": template, "eos_token": "</s>", "added_tokens_decoder": ["x"]}
    made = written(tmp_path, tokenizer_config=config)
    assert made == {"chat_template": "", "end_tokens": ["</s>"]}
    named = {"default": "d", "rag": "t"}
    assert written(tmp_path, tokenizer_config={"chat_template": named})["chat_template"] == "d"


PAIRS = {
    "lines": ("\n  {% if true %}\n d \n{% endif %}\n  ", "  \n\n{{ tools | length }}\n\n"),
    "names": ("{% set a = 1 %}{{ a }}", "{%- macro b(c) %}{{ c }}{% endmacro %}\n{{ b(2) }}\n"),
    "blanks": ("  {%- if true -%} d {%- endif -%}  ", "{# c #}\n t"),
}


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_a_template_for_tools_is_used_for_tools(name: str, as_files: bool, tmp_path: Path) -> None:
    default, tools = PAIRS[name]
    made = byte_tokenizer()
    made.chat_template = {"default": default, "tool_use": tools}
    if as_files:
        made.save_pretrained(tmp_path)
    else:
        pair = [{"name": key, "template": text} for key, text in made.chat_template.items()]
        written(tmp_path, tokenizer_config={"chat_template": pair})
    settings = chat_settings(tmp_path)
    assert settings is not None
    one = byte_tokenizer()
    one.chat_template = json.loads(settings)["chat_template"]
    for given in (None, [], [{"type": "function"}]):
        chat = [{"role": "user", "content": "x"}]
        ours, theirs = (
            t.apply_chat_template(chat, tools=given, tokenize=False) for t in (one, made)
        )
        assert ours == theirs


def test_a_template_for_tools_alone_asks_for_tools(tmp_path: Path) -> None:
    pair = [{"name": "tool_use", "template": "t"}]
    made = byte_tokenizer()
    made.chat_template = written(tmp_path, tokenizer_config={"chat_template": pair})[
        "chat_template"
    ]
    chat = [{"role": "user", "content": "x"}]
    assert made.apply_chat_template(chat, tools=[], tokenize=False) == "t"
    with pytest.raises(Exception, match="needs tools"):
        made.apply_chat_template(chat, tokenize=False)
