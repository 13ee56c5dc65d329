"""Whether a runner can load adapters at all. No torch."""

from collections.abc import Callable

from granatum.v1.errors import GranatumError, InvalidRequest

TROUBLE_S = 60.0
"""A runner says for so long after a failure that it is ill, if no load succeeds."""
_TELLING = 2
"""One adapter that fails may be the adapter; two that fail in a row are the runner."""
_AT_ONCE = ("ADAPTER_DISK_FULL",)
"""Reasons that say so of themselves."""


class LoadTrouble:
    """Why adapters cannot be loaded just now, from how the last loads ended.

    A load has stages, and a success tells of its own stage only: images may still be read from the
    disk while the store is away.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failed: dict[str, object] = {}
        """By digest, the stage; no more than it takes to tell."""
        self._last: GranatumError | None = None
        self._until = 0.0

    @property
    def text(self) -> str:
        """Empty if there is no trouble."""
        if self._last is None or self._clock() >= self._until:
            return ""
        told = len(self._failed) >= _TELLING or self._last.reason in _AT_ONCE
        return f"{self._last.reason}: {self._last.message}" if told else ""

    def fail(self, digest: str, stage: object, error: GranatumError) -> None:
        """A load ended with an error. What is the adapter's own fault tells nothing.

        Routers ask for adapters that their store has: one that is not found may mean that this
        runner was given another store.
        """
        if isinstance(error, InvalidRequest):
            return
        now = self._clock()
        if now >= self._until:
            self._failed.clear()
        if digest in self._failed or len(self._failed) < _TELLING:
            self._failed[digest] = stage
        self._last, self._until = error, now + TROUBLE_S

    def succeed(self, stage: object) -> None:
        """A load got past the stage."""
        self._failed = {digest: s for digest, s in self._failed.items() if s is not stage}
        if not self._failed:
            self._last = None
