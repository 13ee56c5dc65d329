"""The model's own tokenizer: text to ids, chats to ids, and ids to text as they come."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog
from jinja2.exceptions import TemplateError
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from granatum.v1.errors import InvalidRequest, PreconditionFailed
from granatum.v1.validation import MAX_PROMPT_BYTES

REPLACEMENT = "\ufffd"
"""What stands for bytes that are no character, or not yet one."""
_CONTEXT_TOKENS = 8
"""So many tokens before the first new one decide how it is written (its leading space)."""
_CHARACTER_TOKENS = 4
"""A character has at most so many bytes, and so tokens."""
_MOST_KEPT = 64
"""Tokens that wait for one another; what they cost grows with their square."""
_PIECE_CHARACTERS = 1 << 14
"""The smallest piece of a text that is counted alone."""
_MAX_RENDERED = 2 * MAX_PROMPT_BYTES
"""Characters that a chat template may make of messages."""
_MAX_REFUSAL = 500
"""Characters of a chat template's own message that a client gets."""

log = structlog.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _without_panic(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A panic of the tokenizers library is no Exception; as it leaves `call`, it is one."""

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
    """A text has more tokens than asked for; `tokens` says how many, as "301" or "over 512"."""

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
        """The tokens that end a sequence, of those that the model has."""
        return frozenset(token for token in self.end_ids if 0 <= token < vocabulary)

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Ids of `text`, with the special tokens that the model puts around a prompt.

        Other threads go on meanwhile. Raises TooManyTokens if there are more than `most`.
        """
        return self._ids(text, most, special=True)

    def encode_chat(
        self, messages: Sequence[tuple[str, str]], most: int | None = None
    ) -> list[int]:
        """Ids of (role, content) messages in the model's chat template, up to the answer.

        Raises InvalidRequest if the model has no template or the template refuses the messages,
        TooManyTokens if there are more than `most`.
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

        Every piece but the last brings some thousand tokens, and a cut changes a few around it.
        Twice as many tokens as fit are therefore too many wherever the cuts are. So what is
        computed and kept in memory depends on `most`, not on the length of the text: to free four
        million tokens holds up the whole process.
        """
        size = max(4 * most, _PIECE_CHARACTERS)
        count = 0
        for start in range(0, len(text), size) if len(text) > size else ():
            count += len(self._encoded(text[start : start + size], special=False))
            if count > 2 * most:
                raise TooManyTokens(f"over {2 * most}")

    @_without_panic
    def _encoded(self, text: str, *, special: bool) -> Encoding:
        """Unlike `encode`, a batch is encoded without the interpreter's lock."""
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
    """What the client is told: the template's own words, and nothing of how it failed.

    A template's raise_exception is a TemplateError; what jinja itself raises is a subclass.
    """
    if type(error) is TemplateError:
        said = str(error)[:_MAX_REFUSAL]
        return _refused(f"the model's chat template refuses them: {said}")
    log.warning("the chat template failed", error=type(error).__name__)  # the rest may be theirs
    return _refused(
        "the model's chat template cannot write them: check their roles and their order"
    )


class Detokenizer:
    """The text of a sequence's tokens as they are generated.

    All texts together are decode(prompt + generated) without decode(prompt). Text that ends in
    half a character is kept until the rest comes. Where a tokenizer writes single bytes as tokens
    and one of them spoils those before it, what was already given stays.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._special = tokenizer.special_ids
        plain = (token for token in reversed(prompt) if token not in self._special)
        self._context = list(islice(plain, _CONTEXT_TOKENS))[::-1]
        self._before = self._decode(self._context)
        self._kept: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        if token in self._special:
            return ""
        self._kept.append(token)
        text = self._text(self._kept)
        if not text:  # a model may have more ids than its tokenizer has tokens
            del self._kept[:-_CHARACTER_TOKENS]
            return ""
        if not text.endswith(REPLACEMENT):
            return self._give(text, len(self._kept))
        return self._give_garbage(text)

    def flush(self) -> str:
        """What is kept still, half characters as replacement characters."""
        return self._give(self._text(self._kept), len(self._kept)) if self._kept else ""

    def _text(self, kept: list[int]) -> str:
        after = self._decode(self._context + kept)
        if after.startswith(self._before):
            return after[len(self._before) :]
        return self._decode(kept)

    def _give(self, text: str, tokens: int) -> str:
        """`text` of the first `tokens` kept ones, which become the context of the rest."""
        self._context, self._kept = self._kept[:tokens], self._kept[tokens:]
        self._before = self._decode(self._context)
        return text

    def _give_garbage(self, text: str) -> str:
        """Of more tokens than a character can have, those that no further token can repair.

        A tokenizer may write a run of any length as garbage for one byte in it: of that, what it is
        so far is given now and then.
        """
        count = len(self._kept)
        if count <= _CHARACTER_TOKENS:
            return ""
        for first in range(count - 1, count - 1 - _CHARACTER_TOKENS, -1):
            head = self._text(self._kept[:first])
            if head and head + self._decode(self._kept[first:]) == text:
                return self._give(head, first)
        return self._give(text, count) if count >= _MOST_KEPT else ""


def _end_ids(directory: Path, own: int | None) -> frozenset[int]:
    """The tokens that end a sequence, as tokenizer, model and generation settings name them."""
    ids: set[int | None] = {own}
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        settings = json.loads(file.read_text()) if file.is_file() else {}
        named = settings.get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named])
    return frozenset(token for token in ids if token is not None)
