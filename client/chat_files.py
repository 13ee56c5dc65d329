"""What the tokenizer files in an adapter's folder say of chats, as the upload's `chat.json`."""

import json
from pathlib import Path
from typing import Any

from granatum.v1.errors import InvalidRequest

CHAT_FILE = "chat.json"


def chat_settings(directory: Path) -> bytes | None:
    """The folder's own chat template and end tokens; None if the folder has neither.

    Raises InvalidRequest for a file that cannot be read.
    """
    config = _json(directory / "tokenizer_config.json")
    template = _template(directory / "chat_template.jinja") or _default(config.get("chat_template"))
    ends = _end_tokens(config, directory)
    if not template and not ends:
        return None
    settings = {"chat_template": template, "end_tokens": ends}
    try:
        return json.dumps(settings, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _unreadable(directory / "tokenizer_config.json", error) from None


def _template(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def _default(stated: Any) -> str:
    """The template of a tokenizer_config.json, which may name several."""
    if isinstance(stated, list):
        entries = [entry for entry in stated if isinstance(entry, dict)]
        stated = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return stated if isinstance(stated, str) else ""


def _end_tokens(config: dict[str, Any], directory: Path) -> list[str]:
    """The text of each end token; tokenizer_config.json's first."""
    file = directory / "generation_config.json"
    ids = _json(file).get("eos_token_id")
    found = [_text(config.get("eos_token"))]
    known = _added_tokens(config, directory) if ids is not None else {}
    for token in ids if isinstance(ids, list) else [ids]:
        if token is not None:
            text = known.get(str(token))
            if not text:
                raise InvalidRequest(
                    f"{file}: eos_token_id {token} is not among the added tokens of "
                    "tokenizer.json or tokenizer_config.json: save the tokenizer beside the "
                    "adapter, or remove it",
                    field="header.files",
                )
            found.append(text)
    return [text for text in dict.fromkeys(found) if text]


def _added_tokens(config: dict[str, Any], directory: Path) -> dict[str, str]:
    """The text of each added token by its id. transformers 5 keeps them in tokenizer.json alone."""
    listed = _json(directory / "tokenizer.json").get("added_tokens")
    known = {
        str(token.get("id")): _text(token)
        for token in (listed if isinstance(listed, list) else [])
        if isinstance(token, dict)
    }
    decoder = config.get("added_tokens_decoder")
    older = decoder.items() if isinstance(decoder, dict) else ()
    return known | {token: _text(entry) for token, entry in older}


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
