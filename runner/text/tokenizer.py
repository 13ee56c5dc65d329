"""The model's own tokenizer: texts and chats to ids, and ids to text."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog
from jinja2.exceptions import TemplateError
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from granatum.models.config_fields import Fields
from granatum.models.folder import CONFIG_FILE
from granatum.models.identity import end_tokens
from granatum.v1.errors import InvalidRequest, PreconditionFailed
from granatum.v1.validation import MAX_PROMPT_BYTES

_PIECE_CHARACTERS = 1 << 14
"""The smallest piece into which a long text is cut to count its tokens."""
_MAX_RENDERED = 2 * MAX_PROMPT_BYTES
"""The most characters that a chat template may make of messages."""
_MAX_REFUSAL = 500
"""The most characters of a chat template's own message that a client gets."""

log = structlog.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _without_panic(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn a panic of the tokenizers library, which is no Exception, into a RuntimeError."""

    @wraps(call)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise RuntimeError("the tokenizers library panicked") from error

    return guarded


class TooManyTokens(Exception):
    """A text has too many tokens; `tokens` says how many, as "301" or "over 512"."""

    def __init__(self, tokens: str) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class Tokenizer:
    """A model directory's tokenizer. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        try:
            loaded: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise PreconditionFailed(
                f"{directory} holds no tokenizer that can be read ({error}): "
                "the model's tokenizer.json belongs beside its weights"
            ) from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, FastTokenizer):
            raise PreconditionFailed(
                f"{directory} holds a tokenizer without tokenizer.json: convert it to one"
            )
        backend.no_truncation()
        backend.no_padding()
        self._chat = loaded
        self._fast = backend
        self.size: int = backend.get_vocab_size()
        self.special_ids = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )
        self.end_ids = _end_ids(directory, loaded.eos_token_id)
        self._anchor: list[int] = self._encoded("a", special=False).ids
        self.token_text = lru_cache(1 << 16)(self._token_text)

    def ends_within(self, vocabulary: int) -> frozenset[int]:
        """The ids below `vocabulary`, the model's ids, that end a sequence."""
        return frozenset(token for token in self.end_ids if 0 <= token < vocabulary)

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Ids of `text`, with the special tokens that the model puts around a prompt.

        Runs without the interpreter's lock. Raises TooManyTokens if there are more than `most` ids.
        """
        return self._ids(text, most, special=True)

    def encode_chat(
        self, messages: Sequence[tuple[str, str]], most: int | None = None
    ) -> list[int]:
        """Ids of (role, content) messages in the model's chat template, up to the answer.

        Raises InvalidRequest if the model has no template or the template refuses the messages, and
        TooManyTokens if there are more than `most` ids.
        """
        return self._ids(self._rendered(messages), most, special=False)

    @_without_panic
    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`; special tokens are left out unless `special`."""
        text: str = self._fast.decode(ids, skip_special_tokens=not special)
        return text

    def _ids(self, text: str, most: int | None, *, special: bool) -> list[int]:
        if most is not None:
            self._refuse_endless(text, most)
        encoding = self._encoded(text, special=special)
        if most is not None and len(encoding) > most:
            raise TooManyTokens(str(len(encoding)))
        return list(encoding.ids)

    def _refuse_endless(self, text: str, most: int) -> None:
        """Raise TooManyTokens for a text so long that even its pieces cannot fit.

        The pieces are counted one by one until they have more than twice `most` tokens. A cut
        changes only a few tokens around it, so the whole text then has more than `most`. Time and
        memory depend on `most`, not on the length of the text: to free the four million tokens of
        a long text would hold up the whole process.
        """
        size = max(4 * most, _PIECE_CHARACTERS)
        count = 0
        for start in range(0, len(text), size) if len(text) > size else ():
            count += len(self._encoded(text[start : start + size], special=False))
            if count > 2 * most:
                raise TooManyTokens(f"over {2 * most}")

    @_without_panic
    def _encoded(self, text: str, *, special: bool) -> Encoding:
        """Encode as a batch: the library lets go of the interpreter's lock for batches alone."""
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=special)
        return encoding

    def _rendered(self, messages: Sequence[tuple[str, str]]) -> str:
        if not self._chat.chat_template:
            raise _refused("this model has no chat template: send a prompt instead")
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._chat.apply_chat_template(
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

    def _token_text(self, token: int) -> str:
        """The text of one token alone, a leading space included; special tokens by name."""
        before = self.decode(self._anchor, special=True)
        after = self.decode([*self._anchor, token], special=True)
        return after[len(before) :]


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


def _end_ids(directory: Path, own: int | None) -> frozenset[int]:
    """The tokens that end a sequence, as tokenizer, model and generation settings name them."""
    file = directory / CONFIG_FILE
    config = Fields.read(file).values if file.is_file() else {}
    named = (own, *end_tokens(config, directory))
    return frozenset(token for token in named if token is not None)
