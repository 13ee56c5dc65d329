"""What a Python program may hand over, and what no message can carry: the field is named."""

import json
from typing import Any

import numpy as np
import pytest

from granatum.client import Client, Message
from granatum.client.requests import Options, generate_request
from granatum.v1.errors import InvalidRequest

HALF = "ab\ud83d"
"""A text with a lone surrogate."""
CALL = {"name": "weather", "arguments": {"days": 1}}
CHAT = [Message("user", "hi")]

WRONG: list[tuple[str, Any, dict[str, Any], str]] = [
    ("sampling.top_k", "x", {"top_k": -1}, "give a whole number from 0 .*0 keeps all.*not -1"),
    ("sampling.top_k", "x", {"top_k": True}, "not True"),
    ("sampling.top_k", "x", {"top_k": 4.0}, "not 4.0"),
    ("sampling.top_k", "x", {"top_k": np.int64(-1)}, "whole number"),
    ("sampling.seed", "x", {"seed": -1}, "leave it out to have one drawn.*not -1"),
    ("sampling.seed", "x", {"seed": 2**64}, "not 18446744073709551616"),
    ("sampling.temperature", "x", {"temperature": "hot"}, "give a number, not str"),
    ("sampling.temperature", "x", {"temperature": True}, "give a number, not True"),
    ("sampling.top_p", "x", {"top_p": [1]}, "give a number, not list"),
    ("sampling.presence_penalty", "x", {"presence_penalty": 1j}, "not complex"),
    ("stop.max_tokens", "x", {"max_tokens": -1}, "leave it out to fill the context"),
    ("stop.min_tokens", "x", {"min_tokens": "3"}, "not str"),
    ("stop.ignore_eos", "x", {"ignore_eos": "yes"}, "give True or False, not str"),
    ("stop.strings[1]", "x", {"stop": ["a", HALF]}, "character 2 is not Unicode"),
    ("stop.strings[0]", "x", {"stop": HALF}, "character 2"),
    ("stop.strings[1]", "x", {"stop": ["a", None]}, "give text, not NoneType"),
    ("stop.strings", "x", {"stop": 5}, "give a list, not int"),
    ("stop.token_ids[2]", "x", {"stop_token_ids": [1, 2, -3]}, "not -3"),
    ("logprobs.top", "x", {"logprobs": True}, "whole number .*not True"),
    ("priority", "x", {"priority": 2**31}, "not 2147483648"),
    ("adapter", "x", {"adapter": HALF}, "character 2"),
    ("adapter", "x", {"adapter": 7}, "give text, not 7"),
    ("request_id", "x", {"request_id": HALF}, "character 2"),
    ("sampling.temperature", "x", {"temperature": 10**400}, "not one of that many digits"),
    ("sampling.temperature", "x", {"temperature": np.True_}, "give a number"),
    ("sampling.seed", "x", {"seed": -(10**5000)}, "not one of that many digits"),
    ("stop.ignore_eos", "x", {"ignore_eos": -1}, "give True or False, not -1"),
    ("chat.continue_final_message", CHAT, {"continue_final_message": 2**64}, "True or False"),
    ("stop.token_ids[1]", "x", {"stop_token_ids": iter([1, -1])}, "not -1"),
    ("stop.token_ids", "x", {"stop_token_ids": b"ab"}, "give a list, not bytes"),
    ("stop.strings", "x", {"stop": {"a": 1}}, "give a list, not dict"),
    ("stop.strings", "x", {"stop": {"a", "b"}}, "give a list, not set"),
    ("prompt", {1: 2}, {}, "give text"),
    ("prompt", HALF, {}, "character 2"),
    ("prompt", None, {}, "give text"),
    ("prompt", b"bytes", {}, "not bytes"),
    ("prompt", [], {}, "not an empty list"),
    ("prompt", [1, Message("user", "x")], {}, "not a mixture"),
    ("token_ids.ids[1]", [1, "two"], {}, "not str"),
    ("token_ids.ids[0]", [-1], {}, "not -1"),
    ("token_ids.ids[1]", [1, 2**32], {}, "not 4294967296"),
    ("chat.messages[1].content", [*CHAT, Message("user", HALF)], {}, "character 2"),
    ("chat.messages[0].role", [Message(HALF, "x")], {}, "character 2"),
    ("chat.messages[0].content", [Message("user", 5)], {}, "give text, not 5"),  # type: ignore[arg-type]
    ("chat.messages[0].tool_calls", [Message("a", tool_calls=[{1: 2}])], {}, "name 1"),  # type: ignore[dict-item]
    ("chat.messages[0].tool_calls", [Message("a", tool_calls=[{"a": HALF}])], {}, "character"),
    ("chat.template_arguments", CHAT, {"template_arguments": {"a": float("nan")}}, "JSON"),
    ("chat.template_arguments", CHAT, {"template_arguments": {"a": {1, 2}}}, "JSON"),
    ("chat.template_arguments", CHAT, {"template_arguments": {"a": [{None: 1}]}}, "name None"),
    ("chat.template_arguments", "x", {"template_arguments": {}}, "takes a conversation"),
    ("chat.tools", [1, 2], {"tools": []}, "takes a conversation"),
    ("chat.continue_final_message", "x", {"continue_final_message": True}, "conversation"),
    ("chat.add_generation_prompt", CHAT, {"add_generation_prompt": "no"}, "True or False"),
]


@pytest.mark.parametrize(("field", "prompt", "options", "said"), WRONG)
def test_what_no_message_can_carry_names_its_field(
    field: str, prompt: Any, options: Options, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        generate_request(prompt, options)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")


def test_a_nest_without_end_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(InvalidRequest) as refused:
        generate_request(CHAT, {"template_arguments": endless})
    assert refused.value.field == "chat.template_arguments"


def test_numbers_of_numpy_are_numbers() -> None:
    options = Options(top_k=np.int64(3), temperature=np.float32(0.5), seed=np.uint64(2**64 - 1))  # type: ignore[typeddict-item]
    request = generate_request(np.array([5, 6]), options)  # type: ignore[arg-type]
    assert list(request.token_ids.ids) == [5, 6]
    assert (request.sampling.top_k, request.sampling.temperature) == (3, 0.5)
    assert request.sampling.seed == 2**64 - 1


def test_none_is_left_out() -> None:
    options = dict.fromkeys(sorted(Options.__optional_keys__))
    assert generate_request("x", options) == generate_request("x", {})  # type: ignore[arg-type]


def test_a_stop_string_alone_is_one_string() -> None:
    assert list(generate_request("x", {"stop": "END"}).stop.strings) == ["END"]


def test_a_chat_has_what_its_template_takes() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "größe": 1.0}}]
    request = generate_request(
        [
            Message("user", ""),
            Message("assistant", tool_calls=[CALL], reasoning_content="hm"),
            Message("tool", "rain", tool_call_id="c1", name="weather"),
        ],
        {"template_arguments": {"enable_thinking": False}, "tools": tools, "documents": []},
    )
    user, call, answer = request.chat.messages
    assert user.HasField("content")
    assert not call.HasField("content")
    assert (json.loads(call.tool_calls), call.reasoning_content) == ([CALL], "hm")
    assert (answer.tool_call_id, answer.name, answer.content) == ("c1", "weather", "rain")
    assert request.chat.template_arguments == '{"enable_thinking": false}'
    assert json.loads(request.chat.tools) == tools
    assert request.chat.documents == "[]"
    assert not request.chat.HasField("add_generation_prompt")
    assert not generate_request(CHAT, {"add_generation_prompt": False}).chat.add_generation_prompt


@pytest.mark.parametrize("given", ["5", True, 0, -1, 1e10, 10**400, float("nan"), [1], 1j])
async def test_what_is_no_time_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout: give seconds") as refused:
        Client("127.0.0.1:1", timeout=given)
    assert refused.value.field == "timeout"
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match="timeout: give seconds"):
            client.generate("x", timeout=given)


async def test_names_in_other_calls_are_checked_alike() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest) as refused:
            await client.set_alias("prod", HALF)
        assert refused.value.field == "adapter"
        with pytest.raises(InvalidRequest) as refused:
            await client.publish(HALF)
        assert refused.value.field == "name"
