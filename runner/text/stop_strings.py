"""Texts that end a generation, found across the borders of tokens.

A stop string may name special tokens, which clients never see in the text. Within the text that is
searched, a mark stands for each special token that a stop string names; the other special tokens
are as if they were not there. A mark is half of a UTF-16 pair: no decoded text and no stop string
can hold one.
"""

import re
from collections.abc import Mapping, Sequence

_FIRST_MARK = 0xD800


class StopStrings:
    """Passes text on up to the first stop string, and keeps text that may become one.

    `special` has the ids of special tokens by their names.
    """

    def __init__(self, strings: Sequence[str], special: Mapping[str, int]) -> None:
        self._marks: dict[int, str] = {}
        # A model may also spell the name of a special token in ordinary tokens.
        self._strings = tuple({*strings, *(self._marked(string, special) for string in strings)})
        self._hidden = dict.fromkeys(map(ord, self._marks.values()))
        self._kept = ""

    def push(
        self, text: str, token: int | None = None, *, may_stop: bool = True
    ) -> tuple[str, bool]:
        """The text that may go out, and whether a stop string ended it.

        After `text` comes `token`, if that is a special token. Unless `may_stop`, a stop string
        that is complete is text like any other.
        """
        if not self._strings:
            return text, False
        kept = len(self._kept)
        text = self._kept + text + (self._marks.get(token, "") if token is not None else "")
        begins = [text.find(string, max(kept - len(string) + 1, 0)) for string in self._strings]
        found = [at for at in begins if at >= 0]
        if found and may_stop:
            self._kept = ""
            return self._shown(text[: min(found)]), True
        going = len(text) - max(_beginning(string, text) for string in self._strings)
        self._kept = text[going:]
        return self._shown(text[:going]), False

    def flush(self) -> str:
        """The text still kept."""
        kept, self._kept = self._kept, ""
        return self._shown(kept)

    def _shown(self, text: str) -> str:
        return text.translate(self._hidden)

    def _marked(self, string: str, special: Mapping[str, int]) -> str:
        """`string` with marks for the special tokens that it names, the longest names first."""
        named = sorted((name for name in special if name in string), key=len, reverse=True)

        def mark(name: re.Match[str]) -> str:
            return self._marks.setdefault(special[name[0]], chr(_FIRST_MARK + len(self._marks)))

        return re.sub("|".join(map(re.escape, named)), mark, string) if named else string


def _beginning(string: str, text: str) -> int:
    """How many characters at the end of `text` begin `string`, which is not in `text`.

    Looks only at the places of the string's first character. A place that fails is not kept for the
    next call, so each character is compared once on average, however long the string is.
    """
    at = text.find(string[0], max(len(text) - len(string) + 1, 0))
    while at >= 0 and not string.startswith(text[at:]):
        at = text.find(string[0], at + 1)
    return len(text) - at if at >= 0 else 0
