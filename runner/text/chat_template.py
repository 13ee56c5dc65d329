"""A model's chat template: messages to the text that the tokenizer encodes."""

from inspect import signature
from typing import Any

import structlog
from jinja2.exceptions import TemplateError

from granatum.v1.conversation import Conversation
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import Chat
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
        self._taken = signature(settings.apply_chat_template).parameters.keys()
        """Names that would not reach the template; a later transformers may have more of them."""

    def render(self, chat: Chat) -> str:
        """The text of a conversation, up to where the model goes on.

        Raises InvalidRequest if there is no template or the template refuses the conversation.
        """
        if not self._settings.chat_template:
            raise _refused("this model has no chat template: send a prompt instead")
        conversation = Conversation.of(chat)
        for name in conversation.arguments.keys() & self._taken:
            raise _refused(f"{name!r} is taken: leave it out", "chat.template_arguments")
        try:
            text: str = self._settings.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                documents=conversation.documents,
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                **conversation.arguments,
            )
        except Exception as error:  # a template is a program and raises what it likes
            raise _refusal_of(error, conversation) from error
        if len(text) > _MAX_RENDERED:
            raise _refused(
                f"the model's chat template makes {len(text):,} characters of them: "
                f"send less, {_MAX_RENDERED:,} at most"
            )
        return text


def _refused(message: str, field: str = "chat.messages") -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", field=field)


def _refusal_of(error: Exception, conversation: Conversation) -> InvalidRequest:
    """What a client is told of a template's error: only what the template itself says.

    A template's raise_exception raises TemplateError itself; jinja raises subclasses. transformers
    raises ValueError where the text of the last message is not in what the template made.
    """
    if type(error) is TemplateError:
        said = str(error)[:_MAX_REFUSAL]
        return _refused(f"the model's chat template refuses them: {said}")
    if conversation.continue_final_message and type(error) is ValueError:
        return _refused(
            "the model's chat template does not write the last message as it is, so no answer can "
            "go on from it: leave this out, or the message's last part",
            "chat.continue_final_message",
        )
    # The error's text is not logged: it may hold a tenant's messages.
    log.warning("the chat template failed", error=type(error).__name__)
    return _refused(
        "the model's chat template cannot write them: check their roles, their order, and what the "
        "template expects of tools, documents and template_arguments"
    )
