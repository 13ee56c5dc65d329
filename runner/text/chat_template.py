"""A chat template, the model's or an adapter's: messages to the text that is tokenized."""

from inspect import signature
from typing import Any

import structlog

from granatum.adapters_store.chat import ChatSettings
from granatum.runner.text.templates.applied import FLOOD, MAX_RENDERED, TemplateFailed, applied
from granatum.runner.text.templates.foreign import ForeignTemplates
from granatum.v1.conversation import Conversation
from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import Chat

_NONE = ChatSettings()
_BEYOND = {
    "SIGPROF": "takes longer than it may",
    "MemoryError": "takes more memory than it may",
    FLOOD: f"makes more than {MAX_RENDERED:,} characters of them",
}
"""What a template did that failed so."""

log = structlog.get_logger(__name__)


class ChatTemplate:
    """The chat template of `settings`, a tokenizer of transformers. Safe to use from threads.

    An adapter may bring a template of its own.
    """

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._foreign = ForeignTemplates()
        self._taken = signature(settings.apply_chat_template).parameters.keys()
        """Names that would not reach the template; a later transformers may have more of them."""

    def is_foreign(self, own: ChatSettings) -> bool:
        """Whether the adapter's template is another one than the model's."""
        return bool(own.template) and own.template != self._settings.chat_template

    def render(self, chat: Chat, own: ChatSettings = _NONE) -> str:
        """The text of a conversation, up to where the model goes on.

        Raises InvalidRequest if there is no template or the template refuses the conversation.
        """
        if not self._settings.chat_template and not own.template:
            raise _refused("this model has no chat template: send a prompt instead")
        conversation = Conversation.of(chat)
        for name in conversation.arguments.keys() & self._taken:
            raise _refused(f"{name!r} is taken: leave it out", "chat.template_arguments")
        special = {"eos_token": own.end_tokens[0]} if own.end_tokens else {}
        foreign = self.is_foreign(own)
        template = f"the {'adapter' if foreign else 'model'}'s chat template"
        try:
            if foreign:
                special = self._settings.special_tokens_map | special
                text = self._foreign.render(own.template, conversation, special)
            else:
                text = applied(self._settings, conversation, special)
            text.encode()
        except TemplateFailed as error:
            raise _refusal_of(error, template, conversation) from error
        except UnicodeEncodeError:
            raise _refused(f"{template} makes half characters of them: repair it") from None
        return text

    def close(self) -> None:
        """End the process that renders adapters' templates."""
        self._foreign.close()


def _refused(message: str, field: str = "chat.messages") -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}", field=field)


def _refusal_of(error: TemplateFailed, template: str, conversation: Conversation) -> InvalidRequest:
    """What a client is told of a template's error: only what the template itself says.

    transformers raises ValueError where the text of the last message is not in what the template
    made.
    """
    if error.said:
        return _refused(f"{template} refuses them: {error.said}")
    if conversation.continue_final_message and error.kind == ValueError.__name__:
        return _refused(
            f"{template} does not write the last message as it is, so no answer can go on from "
            "it: leave this out, or the message's last part",
            "chat.continue_final_message",
        )
    log.warning("the chat template failed", error=error.kind)
    if what := _BEYOND.get(error.kind):
        return _refused(f"{template} {what}: send less, or simplify it")
    return _refused(
        f"{template} cannot write them: check their roles, their order, and what the template "
        "expects of tools, documents and template_arguments"
    )
