"""Objects in the store that are not ours: named once in the log, and left alone."""

import re

import structlog

_EPOCH = re.compile(r"0|[1-9][0-9]{0,11}")
_REMEMBERED = 1_000

log = structlog.get_logger(__name__)


class Strays:
    """The keys that were met."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def leave(self, key: str) -> None:
        """Say once that this object is no part of the store."""
        if key in self._known or len(self._known) >= _REMEMBERED:
            return
        self._known.add(key)
        log.warning("the store holds what is not ours: move it elsewhere", key=_printable(key))


def _printable(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()


def epoch_in(text: str) -> int | None:
    """The epoch that a part of a key is; None if it is none as we write them."""
    return int(text) if _EPOCH.fullmatch(text) else None
