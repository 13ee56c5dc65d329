"""A request to generate, from Python values to the wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from granatum.client.fields import as_list, extend, put, put_json
from granatum.v1 import inference_pb2
from granatum.v1.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation: `system`, `user`, `assistant` or `tool`, and what they say."""

    role: str
    content: str | None = None
    """None beside `tool_calls`: the message says nothing. Otherwise None means empty."""
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    """The calls that the assistant made, in the form that the model's template expects."""
    tool_call_id: str = ""
    """Of a tool's answer: the call that it answers."""
    name: str = ""
    """The name of the tool or the speaker."""
    reasoning_content: str = ""
    """What the assistant thought before it spoke."""


Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation for the model's chat template."""


class Options(TypedDict, total=False):
    """The options of a request. The service has a default for each that is left out or None."""

    adapter: str
    """`name`, `name@version`, an alias, `sha256:...` or `tenant/name`; absent: the base model."""
    request_id: str
    """It seeds sampling if `seed` is absent. The id of a running request is refused."""
    priority: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    temperature: float
    """0, the default, is greedy."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logprobs: int
    """How many alternatives to list beside each chosen token; absent: no log probabilities."""
    template_arguments: Mapping[str, Any]
    """Of a conversation: variables for the model's template, such as {"enable_thinking": False}."""
    tools: Sequence[Mapping[str, Any]]
    """Of a conversation: the tools that the model may call, as JSON schemas."""
    documents: Sequence[Mapping[str, Any]]
    """Of a conversation: texts for templates that answer from documents."""
    continue_final_message: bool
    """Of a conversation: go on with the last message in place of an answer to it."""
    add_generation_prompt: bool
    """Of a conversation: begin the answer; absent: yes, unless the last message is continued."""
    timeout: float
    """Seconds; absent: the client's own."""


_FIELDS = {
    "adapter": "adapter",
    "request_id": "request_id",
    "priority": "priority",
    "max_tokens": "stop.max_tokens",
    "min_tokens": "stop.min_tokens",
    "ignore_eos": "stop.ignore_eos",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "seed": "sampling.seed",
    "logprobs": "logprobs.top",
    "continue_final_message": "chat.continue_final_message",
    "add_generation_prompt": "chat.add_generation_prompt",
}
_LISTS = {"stop": "stop.strings", "stop_token_ids": "stop.token_ids"}
_JSON = {name: f"chat.{name}" for name in ("template_arguments", "tools", "documents")}
_LOCAL = {"timeout"}


def generate_request(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    """The message of one request.

    Raises TypeError for an option that does not exist, and InvalidRequest, which names the field,
    for a value that no message can carry.
    """
    if unknown := set(options) - Options.__optional_keys__:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    request = inference_pb2.GenerateRequest()
    _set_input(request, prompt)
    for name, value in options.items():
        if value is not None and name not in _LOCAL:
            _set_option(request, name, value)
    return request


def _set_option(request: inference_pb2.GenerateRequest, name: str, value: Any) -> None:
    path = _FIELDS.get(name) or _LISTS.get(name) or _JSON[name]
    if path.startswith("chat.") and not request.HasField("chat"):
        raise InvalidRequest(f"{path}: takes a conversation: give a list of Message", field=path)
    if name in _LISTS:
        extend(request, path, [value] if isinstance(value, str) else value)
    else:
        (put_json if name in _JSON else put)(request, path, value)


def _set_input(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        put(request, "prompt", prompt)
        return
    parts = as_list(prompt) or []
    kinds = {isinstance(part, Message) for part in parts}
    if len(kinds) != 1:
        raise InvalidRequest(
            "prompt: give text (a str), or a list of token ids, or a list of Message; not an empty "
            "list, not bytes, and not a mixture",
            field="prompt",
        )
    if kinds == {False}:
        extend(request, "token_ids.ids", parts)
        return
    for i, message in enumerate(parts):
        _add_message(request, message, i)


def _add_message(request: inference_pb2.GenerateRequest, message: Message, index: int) -> None:
    place = request.chat.messages.add()
    try:
        for name in ("role", "content", "tool_call_id", "name", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                put(place, name, value)
        if message.tool_calls is not None:
            put_json(place, "tool_calls", message.tool_calls)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"chat.messages[{index}].{error.message}", field=f"chat.messages[{index}].{error.field}"
        ) from None
