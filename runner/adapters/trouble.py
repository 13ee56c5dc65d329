"""Whether a runner can load adapters at all. No torch."""

from collections.abc import Callable

from granatum.v1.errors import GranatumError, InvalidRequest

TROUBLE_S = 60.0
"""How long after a failed load a runner reports trouble, if no load succeeds meanwhile."""
_TELLING = 2
"""The adapters that must fail in a row before the runner, not an adapter, counts as the cause."""
_TOLD_AT_ONCE = ("ADAPTER_DISK_FULL",)
"""Reasons that name the runner as the cause with the first failure."""


class LoadTrouble:
    """Why adapters cannot be loaded just now, from how the last loads ended.

    A load has stages, and a success ends the trouble of its own stage only: images may still be
    read from the disk while the store is away.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failed: dict[str, object] = {}
        """The stage at which each of the last adapters failed; at most _TELLING of them."""
        self._last: GranatumError | None = None
        self._until = 0.0

    @property
    def text(self) -> str:
        """The trouble, in words; empty if there is none."""
        if self._last is None or self._clock() >= self._until:
            return ""
        told = len(self._failed) >= _TELLING or self._last.reason in _TOLD_AT_ONCE
        return f"{self._last.reason}: {self._last.message}" if told else ""

    def fail(self, digest: str, stage: object, error: GranatumError) -> None:
        """A load ended with an error. The adapter's own fault does not count.

        NotFound does count: routers ask for adapters that their store has, so this runner may have
        been given another store.
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
        """A load got past `stage`."""
        self._failed = {digest: s for digest, s in self._failed.items() if s is not stage}
        if not self._failed:
            self._last = None
