"""What the adapter cache knows of one adapter. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """How far an adapter has come."""

    MEASURING = auto()
    MEASURED = auto()
    READING = auto()
    IN_HOST = auto()
    COPYING = auto()
    RESIDENT = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """An adapter that is somewhere in memory, or on its way."""

    digest: str
    since: float
    """When it was last asked for and not there."""
    state: State = State.MEASURING
    size: int = 0
    host_pages: tuple[int, ...] = ()
    """Kept beside the device pages for as long as no other image needs them."""
    pages: tuple[int, ...] = ()
    slot: int = -1
    users: int = 0
    asked: int = 0
    """The round in which it was last asked for; a round is the time between two polls."""
    asked_s: float = 0.0
    """When that was."""
    give_up: Callable[[], None] | None = None
    """While it is measured: ends that, where it can be ended."""
    given_up: bool = False
