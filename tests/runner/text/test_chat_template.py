"""Chats in templates of the shapes that models have, against transformers itself."""

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from chats import CALL, CASES, CHATML, SAID, TEMPLATES, USER, wire
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.conversation import TAKEN
from granatum.v1.errors import InvalidRequest


def saved(template: str, directory: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Our tokenizer of a folder with the template, and transformers' own."""
    made = byte_tokenizer()
    made.chat_template = template
    made.save_pretrained(directory)
    return Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    template, messages, options = CASES[name]
    ours, theirs = saved(TEMPLATES[template], tmp_path)
    begins = {"add_generation_prompt": not options.get("continue_final_message")}
    expected = theirs.apply_chat_template(messages, **(begins | options))["input_ids"]
    assert ours.encode_chat(wire(messages, options)) == expected


def test_a_continued_message_is_the_end_of_the_prompt(tmp_path: Path) -> None:
    ours, _ = saved(CHATML, tmp_path)
    ids = ours.encode_chat(wire([USER, SAID], {"continue_final_message": True}))
    assert ours.decode(ids).endswith("<|im_start|>assistant\nIt is")


REFUSED: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str, str]] = {
    "roles in a row": ("mistral", [USER, USER], {}, "chat.messages", "roles must alternate"),
    "two calls": (
        "llama3",
        [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}],
        {},
        "chat.messages",
        "single tool-calls",
    ),
    "a call without a function": (
        "llama3",
        [USER, {"role": "assistant", "tool_calls": [{"name": "weather"}]}],
        {},
        "chat.messages",
        "what the template expects of tools",
    ),
    "a last message that is not written": (
        "llama3",
        [USER, {"role": "assistant", "content": "It is", "tool_calls": [CALL]}],
        {"continue_final_message": True},
        "chat.continue_final_message",
        "does not write the last message",
    ),
    "an argument that would be transformers' own": (
        "chatml",
        [USER],
        {"chat_template": "{{ 1 }}"},
        "chat.template_arguments",
        "'chat_template'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field(name: str, tmp_path: Path) -> None:
    template, messages, options, field, said = REFUSED[name]
    ours, _ = saved(TEMPLATES[template], tmp_path)
    with pytest.raises(InvalidRequest) as refused:
        ours.encode_chat(wire(messages, options))
    assert refused.value.field == field
    assert said in refused.value.message


def test_no_argument_can_be_a_parameter_of_transformers() -> None:
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        assert set(signature(function).parameters) <= TAKEN


def test_a_parameter_of_a_later_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = saved(CHATML, tmp_path)
    monkeypatch.setattr(ours.chat, "_taken", {"brand_new"})
    with pytest.raises(InvalidRequest, match="'brand_new' is taken"):
        ours.encode_chat(wire([USER], {"brand_new": 1}))
