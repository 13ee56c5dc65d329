"""What a chat template gets of a Chat: messages, tools, documents and variables, bounded."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import Chat, ChatMessage

MAX_MESSAGES = 4096
MAX_CONTENT_BYTES = 4 << 20
MAX_ROLE = 64
MAX_NAME = 256
MAX_JSON_BYTES = 1 << 20
MAX_JSON_VALUES = 20_000
"""Commas and opening brackets. They bound the time of parsing, which holds up a whole process."""
MAX_JSON_DEPTH = 32
MAX_ARGUMENTS = 64
_ARGUMENT = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_OF_CHATS = """
    add_generation_prompt additional_special_tokens chat_template continue_final_message
    conversation conversations documents max_length messages padding return_assistant_tokens_mask
    return_dict return_tensors sanitize_control_tokens tokenize tokenizer_kwargs tools truncation
"""
"""What the service gives a template, and what transformers takes beside it."""
_OF_TEMPLATES = """
    caller cycler dict false joiner kwargs lipsum loop namespace none raise_exception range self
    strftime_now super true varargs False None True
"""
"""What the template language gives a template."""
TAKEN = frozenset((_OF_CHATS + _OF_TEMPLATES).split())
"""Names that no template argument may have. Names that end in `_token` are taken as well."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A Chat as Python values. Tools and documents are None where the Chat has none."""

    messages: list[Json]
    tools: list[Json] | None
    documents: list[Json] | None
    arguments: Json
    continue_final_message: bool
    add_generation_prompt: bool

    @classmethod
    def of(cls, chat: Chat) -> "Conversation":
        """Parse a Chat. Raises InvalidRequest for the first field that is wrong."""
        _check_sizes(chat)
        goes_on = chat.continue_final_message
        begins = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None
        _require(
            not (goes_on and begins),
            "chat.add_generation_prompt",
            "the last message is continued, so no answer begins: set only one of the two",
        )
        messages = [_message(message, i) for i, message in enumerate(chat.messages)]
        _require(
            not goes_on or "content" in messages[-1],
            "chat.continue_final_message",
            "the last message has no content to continue: give it one, or leave this out",
        )
        return cls(
            messages=messages,
            tools=_objects(chat.tools, "chat.tools"),
            documents=_objects(chat.documents, "chat.documents"),
            arguments=_arguments(chat.template_arguments),
            continue_final_message=goes_on,
            add_generation_prompt=not goes_on if begins is None else begins,
        )


def _check_sizes(chat: Chat) -> None:
    _require(
        1 <= len(chat.messages) <= MAX_MESSAGES,
        "chat.messages",
        f"give 1 to {MAX_MESSAGES:,} messages",
    )
    said = sum(len(m.content.encode()) + len(m.reasoning_content.encode()) for m in chat.messages)
    _require(
        said <= MAX_CONTENT_BYTES,
        "chat.messages",
        f"give at most {MAX_CONTENT_BYTES:,} bytes of text",
    )
    size = values = 0
    for field, text in _json_texts(chat):
        size += len(text.encode())
        values += sum(map(text.count, ",[{"))
        _require(
            size <= MAX_JSON_BYTES and values <= MAX_JSON_VALUES,
            field,
            f"all JSON of a chat may have {MAX_JSON_BYTES:,} bytes and {MAX_JSON_VALUES:,} commas "
            "and opening brackets: send less",
        )


def _json_texts(chat: Chat) -> Iterator[tuple[str, str]]:
    yield "chat.template_arguments", chat.template_arguments
    yield "chat.tools", chat.tools
    yield "chat.documents", chat.documents
    for i, message in enumerate(chat.messages):
        yield f"chat.messages[{i}].tool_calls", message.tool_calls


def _message(message: ChatMessage, index: int) -> Json:
    """A message as templates know it. A member that was not set is not there."""
    place = f"chat.messages[{index}]"
    _require(
        1 <= len(message.role) <= MAX_ROLE,
        f"{place}.role",
        f"give a role, 1 to {MAX_ROLE} characters, such as 'user'",
    )
    for field in ("tool_call_id", "name"):
        short = len(getattr(message, field)) <= MAX_NAME
        _require(short, f"{place}.{field}", f"give at most {MAX_NAME} characters")
    calls = _objects(message.tool_calls, f"{place}.tool_calls")
    made: Json = {"role": message.role}
    if message.HasField("content") or calls is None:
        made["content"] = message.content
    if calls is not None:
        made["tool_calls"] = calls
    further = {
        "reasoning_content": message.reasoning_content,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return made | {name: value for name, value in further.items() if value}


def _arguments(text: str) -> Json:
    field = "chat.template_arguments"
    if not text:
        return {}
    arguments = _parsed(text, field)
    _require(isinstance(arguments, dict), field, "give a JSON object")
    _require(len(arguments) <= MAX_ARGUMENTS, field, f"give at most {MAX_ARGUMENTS}")
    for name in arguments:
        _require(
            _ARGUMENT.fullmatch(name) is not None,
            field,
            f"{name[:70]!r} cannot be a variable's name: take 1 to 64 letters, digits and _, a "
            "letter first",
        )
        _require(
            name not in TAKEN and not name.endswith("_token"),
            field,
            f"{name!r} means something else to every template: leave it out; tools, documents and "
            "the like have fields of their own",
        )
    return dict(arguments)


def _objects(text: str, field: str) -> list[Json] | None:
    if not text:
        return None
    values = _parsed(text, field)
    right = isinstance(values, list) and all(isinstance(value, dict) for value in values)
    _require(right, field, "give a JSON array of objects")
    return list(values)


def _parsed(text: str, field: str) -> Any:
    """The value of a JSON text. To write it again finds NaN, infinities and lone surrogates."""
    remedy = f"nests deeper than {MAX_JSON_DEPTH}: make it flatter"
    try:
        value = json.loads(text)
        if _is_flat(value):
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            return value
    except UnicodeEncodeError:
        remedy = "a \\u escape is half a character (a lone surrogate): send whole characters"
    except json.JSONDecodeError as error:
        remedy = f"is no JSON ({error}): send what a JSON library writes"
    except ValueError:  # of what JSON's grammar allows, or Python's parser beyond it
        remedy = "has a number that is not finite, or one of thousands of digits: send it as text"
    except RecursionError:
        pass
    raise InvalidRequest(f"{field}: {remedy}", field=field)


def _is_flat(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _nested(parent)]
        if not level:
            return True
    return False


def _nested(value: Any) -> Iterator[Any]:
    """The objects and arrays in a value."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in values if isinstance(child, dict | list))


def _require(right: bool, field: str, remedy: str) -> None:
    if not right:
        raise InvalidRequest(f"{field}: {remedy}", field=field)
