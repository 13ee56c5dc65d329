"""Chats as templates get them, and chats that are wrong, each with the field that is named."""

import json
from typing import Any

import pytest

from granatum.v1 import conversation
from granatum.v1.conversation import Conversation
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import Chat, ChatMessage

USER = ChatMessage(role="user", content="hi")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"days": 1}}}


def chat(*messages: ChatMessage, **fields: Any) -> Chat:
    return Chat(messages=messages or [USER], **fields)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_a_message_has_what_was_set_and_nothing_else() -> None:
    made = Conversation.of(
        chat(
            ChatMessage(role="system"),
            ChatMessage(role="user", content=""),
            ChatMessage(role="assistant", tool_calls=json.dumps([CALL]), reasoning_content="hm"),
            ChatMessage(role="tool", content="rain", tool_call_id="c1", name="weather"),
            ChatMessage(role="assistant", content="", tool_calls=json.dumps([CALL])),
            ChatMessage(role="assistant", content="no", tool_calls="[]"),
        )
    )
    assert made.messages == [
        {"role": "system", "content": ""},
        {"role": "user", "content": ""},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "no", "tool_calls": []},
    ]
    assert (made.tools, made.documents, made.arguments) == (None, None, {})
    assert made.add_generation_prompt
    assert not made.continue_final_message


def test_json_keeps_its_order_and_its_kinds_of_numbers() -> None:
    text = '{"b": 1, "a": 1.0, "c": {"z": [true, null], "y": "é"}}'
    made = Conversation.of(chat(template_arguments=text, tools=f"[{text}]", documents="[]"))
    assert json.dumps(made.arguments, ensure_ascii=False) == text
    assert json.dumps(made.tools, ensure_ascii=False) == f"[{text}]"
    assert made.documents == []


def test_the_prompt_begins_an_answer_unless_told() -> None:
    assert not Conversation.of(chat(add_generation_prompt=False)).add_generation_prompt
    continued = Conversation.of(chat(continue_final_message=True))
    assert continued.continue_final_message
    assert not continued.add_generation_prompt


BAD: list[tuple[str, str, Chat]] = [
    ("chat.messages", "1 to 4,096", Chat()),
    ("chat.messages", "1 to 4,096", chat(*[USER] * 4097)),
    ("chat.messages", "bytes of text", chat(ChatMessage(role="u", content="é" * (2 << 20) + "x"))),
    ("chat.messages[1].role", "give a role", chat(USER, ChatMessage(content="x"))),
    ("chat.messages[0].role", "give a role", chat(ChatMessage(role="r" * 65))),
    ("chat.messages[0].name", "256", chat(ChatMessage(role="r", name="n" * 257))),
    ("chat.messages[0].tool_call_id", "256", chat(ChatMessage(role="r", tool_call_id="n" * 257))),
    ("chat.messages[1].tool_calls", "array", chat(USER, ChatMessage(role="a", tool_calls="{}"))),
    ("chat.messages[0].tool_calls", "no JSON", chat(ChatMessage(role="a", tool_calls="x"))),
    ("chat.tools", "array of objects", chat(tools="[1]")),
    ("chat.tools", "no JSON", chat(tools='[{"a": 1}')),
    ("chat.tools", "a number", chat(tools='[{"a": ' + "9" * 5000 + "}]")),
    ("chat.tools", "deeper than 32", chat(tools=nested(33))),
    ("chat.tools", "deeper than 32", chat(tools=nested(9_999))),
    ("chat.tools", "deeper than 32", chat(tools='[{"a":' * 17 + "1" + "}]" * 17)),
    ("chat.documents", "array of objects", chat(documents='"text"')),
    ("chat.documents", "20,000", chat(documents="[" + "{}," * 10_001 + "{}]")),
    ("chat.documents", "1,048,576", chat(documents=json.dumps([{"text": "x" * (1 << 20)}]))),
    ("chat.template_arguments", "JSON object", chat(template_arguments="[]")),
    ("chat.template_arguments", "not finite", chat(template_arguments='{"a": NaN}')),
    ("chat.template_arguments", "not finite", chat(template_arguments='{"a": -Infinity}')),
    ("chat.template_arguments", "not finite", chat(template_arguments='{"a": 1e999}')),
    ("chat.template_arguments", "no JSON", chat(template_arguments="{1: 2}")),
    ("chat.template_arguments", "surrogate", chat(template_arguments=r'{"a": "\ud83d"}')),
    ("chat.template_arguments", "surrogate", chat(template_arguments=r'{"\ud83d": 1}')),
    *(
        ("chat.template_arguments", "something else", chat(template_arguments=f'{{"{name}": 1}}'))
        for name in ("messages", "raise_exception", "chat_template", "tools", "bos_token", "self")
    ),
    *(
        ("chat.template_arguments", "variable's name", chat(template_arguments=f'{{"{name}": 1}}'))
        for name in ("", "_a", "a b", "a.b", "1a", "é", "a" * 65, "__class__")
    ),
    (
        "chat.template_arguments",
        "at most 64",
        chat(template_arguments=json.dumps({f"a{i}": 1 for i in range(65)})),
    ),
    (
        "chat.add_generation_prompt",
        "only one",
        chat(continue_final_message=True, add_generation_prompt=True),
    ),
    (
        "chat.continue_final_message",
        "no content to continue",
        chat(ChatMessage(role="a", tool_calls=json.dumps([CALL])), continue_final_message=True),
    ),
]


@pytest.mark.parametrize(("field", "said", "wrong"), BAD, ids=lambda value: str(value)[:30])
def test_the_wrong_field_is_named(field: str, said: str, wrong: Chat) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Conversation.of(wrong)
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: ")
    assert said in caught.value.message


def test_what_is_large_and_right_passes() -> None:
    deep = '[{"a":' * 16 + "1" + "}]" * 16
    assert Conversation.of(chat(tools=deep)).tools
    assert (
        len(Conversation.of(chat(documents="[" + "{}," * 9_998 + "{}]")).documents or ()) == 9_999
    )
    text = "x" * ((1 << 20) - 20)
    assert Conversation.of(chat(documents=json.dumps([{"text": text}]))).documents
    long = "é" * (conversation.MAX_CONTENT_BYTES // 2)
    assert Conversation.of(chat(ChatMessage(role="user", content=long))).messages
