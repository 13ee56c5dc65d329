"""What the tokenizer files in an adapter's folder say of chats, as the upload's `chat.json`."""

import json
from pathlib import Path
from typing import Any

from granatum.v1.errors import InvalidRequest

CHAT_FILE = "chat.json"
_TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"
_SETTINGS = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"
_TOOLS = "additional_chat_templates/tool_use.jinja"
SOURCES = (_TEMPLATE, _TOOLS, _GENERATION, _SETTINGS, _TOKENIZER)
"""The files of a folder that are read here."""
_ABUT = "{{ '' }}"
"""Between a tag and a template: transformers has Jinja drop line ends and blanks beside tags."""


def chat_settings(directory: Path) -> bytes | None:
    """The folder's own chat template and end tokens; None if the folder has neither.

    Raises InvalidRequest for a file that cannot be read.
    """
    file = directory / _SETTINGS
    config = _json(file)
    template = _joined(*_templates(config, directory))
    ends = _end_tokens(config, directory)
    if not template and not ends:
        return None
    settings = {"chat_template": template, "end_tokens": ends}
    try:
        return json.dumps(settings, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _unreadable(file, error) from None


def _templates(config: dict[str, Any], directory: Path) -> tuple[str, str]:
    """The folder's template, and the one for chats with tools; each empty if there is none.

    transformers writes several as files, and earlier wrote them into tokenizer_config.json.
    """
    stated = config.get("chat_template")
    if isinstance(stated, list):
        stated = {str(entry.get("name")): entry.get("template") for entry in _objects(stated)}
    named = stated if isinstance(stated, dict) else {"default": stated}
    default = _text_of(directory / _TEMPLATE)
    tools = _text_of(directory / _TOOLS)
    if not default and not tools:
        default, tools = (_text(named.get(name)) for name in ("default", "tool_use"))
    return default, tools


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def _joined(default: str, tools: str) -> str:
    """One template that chooses between two as transformers does."""
    if not tools:
        return default
    if not default:
        default = "{{ raise_exception('the chat template needs tools: send some') }}"
    with_tools, without = (
        _ABUT + _without_last_line_end(text) + _ABUT for text in (tools, default)
    )
    return "{% if tools is not none %}" + with_tools + "{% else %}" + without + "{% endif %}"


def _without_last_line_end(template: str) -> str:
    """Jinja drops the line end that is a template's last character."""
    return template.removesuffix("\n")


def _end_tokens(config: dict[str, Any], directory: Path) -> list[str]:
    """The text of each end token; tokenizer_config.json's first."""
    file = directory / _GENERATION
    ids = _json(file).get("eos_token_id")
    found = [_text(config.get("eos_token"))]
    known = {} if ids is None else _added_tokens(config, directory)
    for token in ids if isinstance(ids, list) else [ids]:
        if token is not None:
            text = _text(known.get(str(token)))
            if not text:
                raise InvalidRequest(
                    f"{file}: eos_token_id {token} is not among the added tokens of {_TOKENIZER} "
                    f"and {_SETTINGS}: save the tokenizer beside the adapter, or remove "
                    f"{file.name}",
                    field="header.files",
                )
            found.append(text)
    return [text for text in dict.fromkeys(found) if text]


def _added_tokens(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Added tokens by their ids. transformers 4 wrote them to tokenizer_config.json as well."""
    stated = config.get("added_tokens_decoder")
    entries = _objects(_json(directory / _TOKENIZER).get("added_tokens"))
    known = {str(entry.get("id")): entry for entry in entries}
    return known | (stated if isinstance(stated, dict) else {})


def _objects(stated: Any) -> list[dict[str, Any]]:
    """The objects of a list; none if it is no list."""
    return [item for item in stated if isinstance(item, dict)] if isinstance(stated, list) else []


def _text(token: Any) -> str:
    """A token's text. transformers writes a token as text, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from None
    return fields if isinstance(fields, dict) else {}


def _unreadable(file: Path, error: Exception) -> InvalidRequest:
    return InvalidRequest(
        f"{file} cannot be read ({error}): take what the trainer saved, or remove the file",
        field="header.files",
    )
