"""What the adapter cache knows of one adapter. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """How far an adapter has come."""

    MEASURING = auto()
    """Its size is being found; if need be, its image is fetched and packed first."""
    MEASURED = auto()
    """Its image is on the local disk."""
    READING = auto()
    """Its image is being read into host pages."""
    IN_HOST = auto()
    """Its image is in host pages."""
    COPYING = auto()
    """Its image is being copied to device pages."""
    RESIDENT = auto()
    """Its image is in device pages."""


@dataclass(slots=True, eq=False)
class Entry:
    """An adapter that is in host or device memory, or on its way there."""

    digest: str
    since: float
    """The time of the first request since the adapter was last on the device or given up."""
    state: State = State.MEASURING
    size: int = 0
    """The pages that the adapter takes, in host and in device memory alike; 0: not yet known."""
    host_pages: tuple[int, ...] = ()
    """The adapter keeps its host pages beside its device pages until another image needs them."""
    pages: tuple[int, ...] = ()
    slot: int = -1
    users: int = 0
    asked: int = 0
    """The round of the last request; a round is the time between two polls."""
    asked_s: float = 0.0
    """The time of the last request."""
    give_up: Callable[[], None] | None = None
    """Ends the measuring, while that can be ended."""
    given_up: bool = False
    """Whether `give_up` was called and the end of the measuring has not been reported."""
