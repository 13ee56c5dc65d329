"""Texts that end a generation, found across the borders of tokens."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but keeps what may yet become a stop string, and ends before one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._beginnings = tuple(map(_Beginning, strings))
        self._kept = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out, and whether a stop string ended it."""
        if not self._strings:
            return text, False
        new, text = text, self._kept + text
        found = [at for at in map(text.find, self._strings) if at >= 0]
        if found:
            self._kept = ""
            return text[: min(found)], True
        going = len(text) - max(beginning.push(new) for beginning in self._beginnings)
        self._kept = text[going:]
        return text[:going], False

    def flush(self) -> str:
        """What is kept still."""
        kept, self._kept = self._kept, ""
        return kept


class _Beginning:
    """How many characters at the end of a text begin a string, as Knuth, Morris and Pratt count.

    Each character costs a step or two however long the string is. The whole string never appears.
    """

    def __init__(self, string: str) -> None:
        self._string = string
        self._shorter = [0]
        """For each length of a beginning: the next shorter beginning that also ends there."""
        self._length = 0
        length = 0
        for character in string[1:]:
            length = self._next(length, character)
            self._shorter.append(length)

    def push(self, text: str) -> int:
        """The count after `text` more."""
        for character in text:
            self._length = self._next(self._length, character)
        return self._length

    def _next(self, length: int, character: str) -> int:
        while length and self._string[length] != character:
            length = self._shorter[length - 1]
        return length + (self._string[length] == character)
