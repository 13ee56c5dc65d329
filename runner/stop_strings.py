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
        going = len(text) - self._overlap(text)
        self._kept = text[going:]
        return text[:going], False

    def flush(self) -> str:
        """What is kept still."""
        kept, self._kept = self._kept, ""
        return kept

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self._strings)) - 1, len(text))
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
