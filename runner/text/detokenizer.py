"""Ids to text, token by token.

The tokenizers library's own DecodeStream does not serve here. It raises where a byte-fallback
decoder rewrites earlier bytes. It holds back bytes that are no character until a character follows,
at a cost that grows with the square of their number. It cannot give at the end what it holds back.
"""

from collections.abc import Sequence
from itertools import islice

from granatum.runner.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""Stands for bytes that are no character, or not yet one."""
_CONTEXT_TOKENS = 8
"""The tokens before the first new one that may decide how it is written (its leading space)."""
_CHARACTER_TOKENS = 4
"""The most bytes of a character, and so the most tokens that it may take."""
_MOST_KEPT = 64
"""The most tokens that wait for one another; their cost grows with the square of their number."""


class Detokenizer:
    """The text of a sequence's tokens as they are generated.

    All texts together are decode(prompt + generated) without decode(prompt). Text that ends in
    half a character is kept until the rest comes. There is one exception: a byte-fallback decoder
    may write a whole run of bytes as garbage because of its last byte, but text that was already
    given is not taken back.
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
        if not text:  # the model has ids that its tokenizer lacks
            del self._kept[:-_CHARACTER_TOKENS]
            return ""
        if not text.endswith(REPLACEMENT):
            return self._give(text, len(self._kept))
        return self._give_garbage(text)

    def flush(self) -> str:
        """The text of the tokens still kept, with replacement characters for half characters."""
        return self._give(self._text(self._kept), len(self._kept)) if self._kept else ""

    def _text(self, kept: list[int]) -> str:
        after = self._decode(self._context + kept)
        if after.startswith(self._before):
            return after[len(self._before) :]
        return self._decode(kept)

    def _give(self, text: str, tokens: int) -> str:
        """Give `text`, the text of the first `tokens` kept tokens. They become the context now."""
        self._context, self._kept = self._kept[:tokens], self._kept[tokens:]
        self._before = self._decode(self._context)
        return text

    def _give_garbage(self, text: str) -> str:
        """Give the text of all kept tokens but the last few, which may yet become a character.

        Further tokens cannot change the text of the others, because a character takes at most
        _CHARACTER_TOKENS tokens. A decoder that writes a long run as garbage for one byte in it
        leaves no place to cut: all of the run is given once _MOST_KEPT tokens are kept.
        """
        count = len(self._kept)
        if count <= _CHARACTER_TOKENS:
            return ""
        for first in range(count - 1, count - 1 - _CHARACTER_TOKENS, -1):
            head = self._text(self._kept[:first])
            if head and head + self._decode(self._kept[first:]) == text:
                return self._give(head, first)
        return self._give(text, count) if count >= _MOST_KEPT else ""
