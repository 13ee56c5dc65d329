"""What the engine asks of the adapter cache. No torch."""

from dataclasses import dataclass
from typing import Protocol

import structlog

from granatum.runner.records import Departure, Failure
from granatum.v1.errors import GranatumError, Internal, InvalidRequest

_LARGER = ("ADAPTER_RANK_TOO_HIGH", "ADAPTER_TOO_LARGE")
"""Reasons of errors that come from this runner's size: a larger runner may serve the adapter."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterFigures:
    """The adapters on the device, in numbers."""

    resident: tuple[str, ...]
    """Digests on the device; the same object until they change."""
    loads: int
    """Adapters brought onto the device so far."""
    reclaimable_pages: int
    """Pages of adapters without users."""
    trouble: str = ""
    """Why adapters cannot be loaded just now; empty: they can."""


class Adapters(Protocol):
    """Adapters on the device, by digest. Nothing here blocks."""

    def acquire(self, digest: str) -> int | None:
        """Adds a user and returns the adapter's slot.

        Only steps launched after `await_copy` may use the slot. Returns None while the adapter is
        being brought: the first call starts the load, later calls poll. Raises if the adapter
        cannot be had.
        """

    def await_copy(self) -> None:
        """If the adapter of the oldest copy has a user, the next launch waits for the copy."""

    def release(self, digest: str) -> None:
        """One user less."""

    def pages_of(self, digest: str) -> int:
        """Pages that an acquired adapter takes."""

    def poll(self) -> None:
        """Once per step: finish and start copies."""

    def reclaim(self, pages: int) -> int:
        """Free at least `pages` pages of unused adapters; returns how many were freed.

        The oldest use goes first. Nothing is freed if they have fewer pages in all.
        """

    @property
    def figures(self) -> AdapterFigures:
        """The figures of the moment."""


class NoAdapters:
    """No adapters: the engine serves the base model alone."""

    figures = AdapterFigures((), 0, 0)

    def acquire(self, digest: str) -> int | None:
        """Refuse every adapter."""
        raise LookupError(f"this engine was started without adapters and cannot serve {digest}")

    def await_copy(self) -> None:
        """Nothing is on its way."""

    def release(self, digest: str) -> None:
        """Do nothing: nothing was acquired."""

    def pages_of(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """No pages."""
        return 0

    def poll(self) -> None:
        """Do nothing: nothing moves."""

    def reclaim(self, pages: int) -> int:  # noqa: ARG002 - the protocol's signature
        """Free nothing."""
        return 0


def failure_of(error: Exception) -> Failure:
    """What a client is told of `error`; an unexpected one is logged, and not told in detail."""
    if not isinstance(error, GranatumError):
        log.error("adapter load", exc_info=error)
        error = Internal("the adapter could not be loaded: the runner's log has the details")
    return Failure.of(error)


def outcome_of(error: Exception) -> tuple[Departure | Failure, Failure | None]:
    """How to end a sequence whose adapter cannot be loaded. The cause is set if it departs.

    The sequence departs where another runner may have the adapter: a healthy runner, a larger one,
    or one with the right store. An adapter that is wrong in itself fails on every runner.
    """
    failure = failure_of(error)
    if isinstance(error, InvalidRequest) and failure.reason not in _LARGER:
        return failure, None
    return Departure.LOAD_FAILED, failure
