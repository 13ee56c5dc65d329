"""Texts that end a generation, found across the borders of tokens."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but keeps what may yet become a stop string, and ends before one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._kept = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out, and whether a stop string ended it."""
        if not self._strings:
            return text, False
        text = self._kept + text
        found = [at for at in map(text.find, self._strings) if at >= 0]
        if found:
            self._kept = ""
            return text[: min(found)], True
        going = len(text) - max(_beginning(string, text) for string in self._strings)
        self._kept = text[going:]
        return text[:going], False

    def flush(self) -> str:
        """What is kept still."""
        kept, self._kept = self._kept, ""
        return kept


def _beginning(string: str, text: str) -> int:
    """How many characters at the end of `text` begin `string`, which is not in it.

    Looks at places with its first character alone. What fails at one of them is kept no longer, so
    that a character costs one comparison in all, however long the string is.
    """
    at = text.find(string[0], max(len(text) - len(string) + 1, 0))
    while at >= 0 and not string.startswith(text[at:]):
        at = text.find(string[0], at + 1)
    return len(text) - at if at >= 0 else 0
