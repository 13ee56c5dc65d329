"""What routers ask of the registry and what it answers: placements, queue entries, leases."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """A sequence that wants a runner."""

    id: str
    """Unique in the fleet; names the reservation."""
    tokens: int
    """Of prompt and output so far, estimated or known: what must fit into pages at once."""
    priority: int = 0
    entry: str | None = None
    """Its place in the queue's order, given by the first attempt and kept for life.

    Whoever comes with one was admitted before, and the queue's bound no longer applies to it.
    """
    exclude: Collection[str] = ()
    """Runners that just sent this sequence back: taken only if no other has room."""
    avoid: Collection[str] = ()
    """Runners that this router cannot reach: never taken."""


class LeaseKind(Enum):
    """What a lease keeps."""

    RESERVATION = "reservation"
    ENTRY = "entry"
    CLAIM = "claim"


@dataclass(frozen=True, slots=True)
class Lease:
    """Something that a router holds in the registry until it lets go, or dies and it lapses."""

    kind: LeaseKind
    name: str
    """Of a reservation the runner, of a claim what is claimed; of an entry nothing."""
    member: str
    """Of a reservation the sequence, of a claim its owner, of an entry the entry."""
    pages: int = 0
    """Reserved pages, given back with a reservation."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A runner has reserved room."""

    runner_id: str
    address: str
    entry: str
    reservation: Lease


@dataclass(frozen=True, slots=True)
class Queued:
    """No room now, or others came first: waits in the queue."""

    entry: str
    live_runners: int

    @property
    def lease(self) -> Lease:
        """What keeps its place in the queue."""
        return Lease(LeaseKind.ENTRY, "", self.entry)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Only runners that this router cannot reach have room. Not in the queue, so it blocks none."""

    entry: str
    live_runners: int


@dataclass(frozen=True, slots=True)
class Full:
    """No room, and the queue is at its bound."""

    live_runners: int


Outcome = Placed | Queued | Unreachable | Full
