"""What moves adapters for the adapter cache, and the events that tell of the ends. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from granatum.v1.errors import GranatumError, Unavailable


@dataclass(frozen=True, slots=True)
class Measured:
    """An adapter's image is on the local disk and takes `pages` pages."""

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
    """The error of a load that was given up, because nobody waits for it any more."""
    return Unavailable(
        "nobody waits for this adapter any more: try again", reason="ADAPTER_LOAD_ABANDONED"
    )


class Mover(Protocol):
    """Moves images. Every call returns at once, and an event tells when the movement has ended."""

    @property
    def host_pages(self) -> int:
        """Pages of host memory, through which all images go."""
        ...

    @property
    def quick_pages(self) -> int:
        """The most pages that are copied in about the time of the shortest step."""
        ...

    def size(self, digest: str) -> int | None:
        """Pages that the adapter takes; None if that cannot be told without I/O."""
        ...

    def measure(self, digest: str) -> Callable[[], None] | None:
        """Find how many pages the adapter takes; ends as Measured or Failed.

        Returns a function that ends the measuring, or None. A measuring ended so reports Failed,
        unless it has reported already.
        """
        ...

    def read(self, digest: str, host_pages: tuple[int, ...]) -> None:
        """Read the image into host pages; ends as Read or Failed."""
        ...

    def copy(
        self, digest: str, slot: int, host_pages: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        """Copy to the device, then write the slot's table row; ends as Copied.

        Copies end in the order of the calls.
        """
        ...

    def fence(self, digest: str) -> None:
        """Have the device run what is launched from now on after the copy that is under way."""
        ...

    def events(self) -> list[Event]:
        """The movements that have ended since the last call."""
        ...
