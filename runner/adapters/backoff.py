"""When a load that failed is tried again. No torch."""

from collections.abc import Callable
from dataclasses import dataclass

from granatum.v1.errors import GranatumError

BACKOFF_S = 1.0
"""The pause after a failed load; each further failure in a row doubles it."""
BACKOFF_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """The last of `times` failures in a row."""

    error: GranatumError
    times: int
    until: float
    """The end of the pause."""


class Backoffs:
    """Pauses after failed loads, by digest. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[str, _Failure] = {}

    def check(self, digest: str) -> None:
        """Raise the error of the adapter's last load while the adapter may not be tried again."""
        last = self._failures.get(digest)
        if last is not None and self._clock() < last.until:
            raise last.error.with_traceback(None)

    def fail(self, digest: str, error: GranatumError) -> None:
        """A load failed: begin a pause."""
        now = self._clock()
        kept = {d: f for d, f in self._failures.items() if now < f.until + 2 * BACKOFF_MAX_S}
        times = kept[digest].times + 1 if digest in kept else 1
        pause = min(BACKOFF_S * 2 ** (times - 1), BACKOFF_MAX_S)
        self._failures = {**kept, digest: _Failure(error, times, now + pause)}

    def succeed(self, digest: str) -> None:
        """A load succeeded: its earlier failures no longer count."""
        self._failures.pop(digest, None)
