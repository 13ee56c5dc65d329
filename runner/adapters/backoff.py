"""When an adapter whose load failed is tried again. No torch."""

from dataclasses import dataclass
from typing import Self

from granatum.v1.errors import GranatumError

BACKOFF_S = 1.0
"""How long a failed load is not tried again; doubles with each failure in a row."""
BACKOFF_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """A load that failed, and when it may be tried again."""

    error: GranatumError
    failures: int
    until: float

    @classmethod
    def after(cls, before: Self | None, error: GranatumError, now: float) -> Self:
        """Of a load that fails now; `before` is the one of its last failure."""
        failures = before.failures + 1 if before else 1
        return cls(error, failures, now + min(BACKOFF_S * 2 ** (failures - 1), BACKOFF_MAX_S))

    @property
    def forgotten(self) -> float:
        """When its failures stop counting."""
        return self.until + 2 * BACKOFF_MAX_S
