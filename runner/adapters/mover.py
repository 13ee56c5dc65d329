"""What the adapter cache has moved for it, and how it hears of the end. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from granatum.v1.errors import GranatumError, Unavailable


@dataclass(frozen=True, slots=True)
class Measured:
    """How many pages an adapter takes."""

    digest: str
    pages: int


@dataclass(frozen=True, slots=True)
class Read:
    """An adapter's image is in its host pages."""

    digest: str


@dataclass(frozen=True, slots=True)
class Copied:
    """An adapter is in its device pages and its slot's table row is written."""

    digest: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An adapter could not be measured or read."""

    digest: str
    error: GranatumError


Event = Measured | Read | Copied | Failed


def abandoned() -> Unavailable:
    """The error of a load that was given up, because nobody waits for it."""
    return Unavailable(
        "nobody waits for this adapter any more: try again", reason="ADAPTER_LOAD_ABANDONED"
    )


class Mover(Protocol):
    """Moves images. Every call returns at once; what it began ends as an event."""

    @property
    def host_pages(self) -> int:
        """Pages of host memory that it moves through."""
        ...

    @property
    def quick_pages(self) -> int:
        """Pages that are copied to the device within the shortest step or so."""
        ...

    def size(self, digest: str) -> int | None:
        """Pages that the adapter takes, where that is known without I/O."""
        ...

    def measure(self, digest: str) -> Callable[[], None] | None:
        """Find how many pages the adapter takes; ends as Measured or Failed.

        What is returned, if anything, gives it up: it ends as Failed then, if it is not too late.
        """
        ...

    def read(self, digest: str, host_pages: tuple[int, ...]) -> None:
        """Bring the image into host pages; ends as Read or Failed."""
        ...

    def copy(
        self, digest: str, slot: int, host_pages: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        """Copy to the device, then write the slot's table row; ends as Copied, in order."""
        ...

    def fence(self, digest: str) -> None:
        """Have the device run what is launched from now on after the copy, which is under way."""
        ...

    def events(self) -> list[Event]:
        """What has ended since the last call."""
        ...
