"""The model's own tokenizer: text to ids, chats to ids, and ids to text as they come."""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from granatum.v1.errors import InvalidRequest, PreconditionFailed

REPLACEMENT = "\ufffd"
"""What stands for bytes that are no character, or not yet one."""
_CONTEXT_TOKENS = 8
"""So many tokens before the first new one decide how it is written (its leading space)."""
_CHARACTER_TOKENS = 4
"""A character has at most so many bytes, and so tokens."""


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
        self.token_text = lru_cache(1 << 16)(self._token_text)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens that the model puts around a prompt."""
        return list(self._fast.encode(text).ids)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of (role, content) messages in the model's chat template, up to the answer.

        Raises InvalidRequest if the model has no template or the template refuses the messages.
        """
        if not self._chat.chat_template:
            raise InvalidRequest("this model has no chat template: send a prompt instead")
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._chat.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program and raises what it likes
            raise InvalidRequest(f"the model's chat template refuses this: {error}") from error
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text

    def _token_text(self, token: int) -> str:
        """The text of one token alone, a leading space included; special tokens by name."""
        anchor = self._fast.encode("a", add_special_tokens=False).ids
        before = self._fast.decode(anchor, skip_special_tokens=False)
        after: str = self._fast.decode([*anchor, token], skip_special_tokens=False)
        return after[len(before) :]


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
        if not text:
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
        """Of more tokens than a character can have, those that no further token can repair."""
        count = len(self._kept)
        if count <= _CHARACTER_TOKENS:
            return ""
        for first in range(count - 1, count - 1 - _CHARACTER_TOKENS, -1):
            head = self._text(self._kept[:first])
            if head and head + self._decode(self._kept[first:]) == text:
                return self._give(head, first)
        return ""


def _end_ids(directory: Path, own: int | None) -> frozenset[int]:
    """The tokens that end a sequence, as tokenizer, model and generation settings name them."""
    ids: set[int | None] = {own}
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        settings = json.loads(file.read_text()) if file.is_file() else {}
        named = settings.get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named])
    return frozenset(token for token in ids if token is not None)
