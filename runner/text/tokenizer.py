"""The model's own tokenizer: texts and chats to ids, and ids to text."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from granatum.adapters_store.chat import ChatSettings
from granatum.models.config_fields import Fields
from granatum.models.folder import CONFIG_FILE
from granatum.models.identity import end_tokens
from granatum.runner.text.chat_template import ChatTemplate
from granatum.runner.text.tokenizer_files import read_tokenizer, without_panic
from granatum.v1.inference_pb2 import Chat

_NO_OWN = ChatSettings()
_PIECE_CHARACTERS = 1 << 14
"""The smallest piece into which a long text is cut to count its tokens."""


class TooManyTokens(Exception):
    """A text has too many tokens; `tokens` says how many, as "301" or "over 512"."""

    def __init__(self, tokens: str) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class Tokenizer:
    """A model directory's tokenizer. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._fast, settings = read_tokenizer(directory)
        self.chat = ChatTemplate(settings)
        self.size: int = self._fast.get_vocab_size()
        added = self._fast.get_added_tokens_decoder()
        self.special_tokens = {entry.content: id_ for id_, entry in added.items() if entry.special}
        """The ids of special tokens, which have no text, by their names."""
        self.special_ids = frozenset(self.special_tokens.values())
        self.end_ids = _end_ids(directory, self._fast, settings.eos_token)
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

    def ends_of(self, own: ChatSettings) -> frozenset[int]:
        """The ids of an adapter's own end tokens. A token that the model lacks ends nothing."""
        ids = map(self._fast.token_to_id, own.end_tokens)
        return frozenset(token for token in ids if token is not None)

    def encode_chat(
        self, chat: Chat, most: int | None = None, own: ChatSettings = _NO_OWN
    ) -> list[int]:
        """Ids of a conversation in the chat template, up to where the model goes on.

        `own` is what the adapter brings.

        Raises InvalidRequest if the model has no template or the template refuses the chat, and
        TooManyTokens if there are more than `most` ids.
        """
        return self._ids(self.chat.render(chat, own), most, special=False)

    @without_panic
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

    @without_panic
    def _encoded(self, text: str, *, special: bool) -> Encoding:
        """Encode as a batch: the library lets go of the interpreter's lock for batches alone."""
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=special)
        return encoding

    def _token_text(self, token: int) -> str:
        """The text of one token alone, a leading space included; special tokens by name."""
        before = self.decode(self._anchor, special=True)
        after = self.decode([*self._anchor, token], special=True)
        return after[len(before) :]


def _end_ids(directory: Path, fast: FastTokenizer, own: str | None) -> frozenset[int]:
    """The tokens that end a sequence, as tokenizer, model and generation settings name them."""
    file = directory / CONFIG_FILE
    config = Fields.read(file).values if file.is_file() else {}
    ends = fast.token_to_id(own) if own else None
    named = (ends, *end_tokens(config, directory))
    return frozenset(token for token in named if token is not None)
