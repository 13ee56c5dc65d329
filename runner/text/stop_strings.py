"""Texts that end a generation, found across the borders of tokens."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and keeps text that may become one."""

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
        """The text still kept."""
        kept, self._kept = self._kept, ""
        return kept


def _beginning(string: str, text: str) -> int:
    """How many characters at the end of `text` begin `string`, which is not in `text`.

    Looks only at the places of the string's first character. A place that fails is not kept for the
    next call, so each character is compared once on average, however long the string is.
    """
    at = text.find(string[0], max(len(text) - len(string) + 1, 0))
    while at >= 0 and not string.startswith(text[at:]):
        at = text.find(string[0], at + 1)
    return len(text) - at if at >= 0 else 0
