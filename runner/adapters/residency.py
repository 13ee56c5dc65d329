"""What the engine asks of whoever keeps adapters on the device. No torch."""

from dataclasses import dataclass
from typing import Protocol

import structlog

from granatum.runner.records import Departure, Failure
from granatum.v1.errors import GranatumError, Internal, InvalidRequest

_LARGER = ("ADAPTER_RANK_TOO_HIGH", "ADAPTER_TOO_LARGE")
"""Errors of this runner's size: a larger runner may serve the adapter."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """What the device holds of adapters."""

    resident: tuple[str, ...]
    """Digests on the device; the same object until they change."""
    loads: int
    """Adapters brought onto the device so far."""
    reclaimable_pages: int
    """Pages of adapters in no use."""
    trouble: str = ""
    """Why adapters cannot be loaded just now; empty: they can."""


class Adapters(Protocol):
    """Adapters on the device, by digest. Nothing here blocks."""

    def acquire(self, digest: str) -> int | None:
        """The adapter's slot for steps launched after `await_copy`, with one user more.

        None while it is being brought: the first call starts that, later ones poll. Raises if it
        cannot be had.
        """

    def await_copy(self) -> None:
        """Have the device end the copy of an adapter in use before it runs what comes next."""

    def release(self, digest: str) -> None:
        """One user less."""

    def pages_of(self, digest: str) -> int:
        """Pages that an acquired adapter takes."""

    def poll(self) -> None:
        """Once per step: finish and start copies."""

    def reclaim(self, pages: int) -> int:
        """Free up to about `pages` pages of unused adapters, oldest first; how many it was."""

    @property
    def figures(self) -> AdapterFigures:
        """As they are now."""


class NoAdapters:
    """Serves the base model alone."""

    figures = AdapterFigures((), 0, 0)

    def acquire(self, digest: str) -> int | None:
        """Always refused."""
        raise LookupError(f"this engine was started without adapters and cannot serve {digest}")

    def await_copy(self) -> None:
        """Nothing is on its way."""

    def release(self, digest: str) -> None:
        """Nothing to release."""

    def pages_of(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """None."""
        return 0

    def poll(self) -> None:
        """Nothing to do."""

    def reclaim(self, pages: int) -> int:  # noqa: ARG002 - the protocol's signature
        """Nothing to give."""
        return 0


def failure_of(error: Exception) -> Failure:
    """What a client is told of `error`."""
    if not isinstance(error, GranatumError):
        log.error("adapter load", exc_info=error)
        error = Internal("the adapter could not be loaded: the runner's log has the details")
    return Failure(error.code, error.message, error.reason, error.field or "")


def outcome_of(error: Exception) -> tuple[Departure | Failure, Failure | None]:
    """How a sequence ends whose adapter cannot be had, and the cause if it departs.

    It departs where another runner may have the adapter: a healthy one, a larger one, or one with
    the right store. An adapter that is wrong in itself is so everywhere.
    """
    failure = failure_of(error)
    if isinstance(error, InvalidRequest) and failure.reason not in _LARGER:
        return failure, None
    return Departure.LOAD_FAILED, failure
