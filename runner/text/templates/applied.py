"""How transformers applies a chat template, and how a template fails."""

from typing import Any

from jinja2.exceptions import TemplateError

from granatum.v1.conversation import Conversation
from granatum.v1.validation import MAX_PROMPT_BYTES

MAX_RENDERED = 2 * MAX_PROMPT_BYTES
"""The most characters that a chat template may make of a conversation."""
FLOOD = "Flood"
"""The kind of a failure: the template made more than MAX_RENDERED characters."""
_MAX_SAID = 500
"""The most characters of a template's own message that a client gets."""


class TemplateFailed(Exception):
    """A template failed: `kind` is the class of what it raised, the signal that ended it, or FLOOD.

    `said` is the template's own message.
    """

    def __init__(self, kind: str, said: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.said = said


def applied(settings: Any, conversation: Conversation, special: dict[str, Any], **more: Any) -> str:
    """The text of a conversation by a tokenizer of transformers. Raises TemplateFailed.

    `special` are variables for special tokens, in place of the tokenizer's own.
    """
    try:
        text: str = settings.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            documents=conversation.documents,
            tokenize=False,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            **more,
            **special,
            **conversation.arguments,
        )
    except Exception as error:  # a template is a program and raises what it likes
        # A template's raise_exception raises TemplateError itself; jinja raises subclasses. No
        # other text is passed on: it may hold a tenant's messages.
        said = str(error)[:_MAX_SAID] if type(error) is TemplateError else ""
        raise TemplateFailed(type(error).__name__, said) from error
    if len(text) > MAX_RENDERED:
        raise TemplateFailed(FLOOD)
    return text
