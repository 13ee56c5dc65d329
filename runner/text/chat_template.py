"""A model's chat template: messages to the text that the tokenizer encodes."""

from collections.abc import Sequence
from typing import Any

import structlog
from jinja2.exceptions import TemplateError

from granatum.v1.errors import InvalidRequest
from granatum.v1.validation import MAX_PROMPT_BYTES

_MAX_RENDERED = 2 * MAX_PROMPT_BYTES
"""The most characters that a chat template may make of messages."""
_MAX_REFUSAL = 500
"""The most characters of a chat template's own message that a client gets."""

log = structlog.get_logger(__name__)


class ChatTemplate:
    """The chat template of `settings`, a tokenizer of transformers. Safe to use from threads."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, content) messages, up to where the answer begins.

        Raises InvalidRequest if there is no template or the template refuses the messages.
        """
        if not self._settings.chat_template:
            raise _refused("this model has no chat template: send a prompt instead")
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._settings.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program and raises what it likes
            raise _refusal_of(error) from error
        if len(text) > _MAX_RENDERED:
            raise _refused(
                f"the model's chat template makes {len(text):,} characters of them: "
                f"send less, {_MAX_RENDERED:,} at most"
            )
        return text


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(f"chat.messages: {message}", field="chat.messages")


def _refusal_of(error: Exception) -> InvalidRequest:
    """What a client is told of a template's error: only what the template itself says.

    A template's raise_exception raises TemplateError itself; jinja raises subclasses.
    """
    if type(error) is TemplateError:
        said = str(error)[:_MAX_REFUSAL]
        return _refused(f"the model's chat template refuses them: {said}")
    # The error's text is not logged: it may hold a tenant's messages.
    log.warning("the chat template failed", error=type(error).__name__)
    return _refused(
        "the model's chat template cannot write them: check their roles and their order"
    )
