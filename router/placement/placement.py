"""What routers ask of the registry and what it answers: placements, queue entries, leases."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

_ENTRY_LEASE_S = 1.5


@dataclass(frozen=True, slots=True)
class Terms:
    """How long what the registry keeps holds, in seconds, and how many requests it lets wait."""

    lease_s: float
    """Of what a router holds: reservations and claims."""
    runner_lease_s: float
    """Of a runner, from its last heartbeat."""
    max_queue: int
    """Requests in the queue."""
    max_queued_per_tenant: int
    max_running_per_tenant: int
    """Requests of one tenant with a reservation; 0: no bound."""

    @property
    def entry_lease_s(self) -> float:
        """Of an entry in the queue.

        The queue does not wait longer for a router that died. A router that only stalled gets its
        places back.
        """
        return min(self.lease_s, _ENTRY_LEASE_S)


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

    Whoever left its runner by its client's own doing comes without one, behind all who wait.
    """
    admitted: bool = False
    """Whether it was placed before: the bounds of the queue no longer apply to it."""
    exclude: Collection[str] = ()
    """Runners that just sent this sequence back: taken only if no other has room."""
    avoid: Collection[str] = ()
    """Runners that this router cannot reach: never taken."""
    tenant: str = ""
    """Whose it is: tenants take turns."""
    weight: float = 1.0
    """How many turns the tenant gets for one of a tenant of weight 1."""
    adapter: bool = False
    """Whether it needs an adapter."""
    rank: int = 0
    """Of its adapter; a runner with a lower limit is never taken."""
    elements: int = 0
    """Of its adapter; a runner without room for them is never taken."""


class LeaseKind(Enum):
    """What a lease keeps."""

    RESERVATION = "reservation"
    ENTRY = "entry"
    CLAIM = "claim"
    SEQUENCE = "sequence"
    """Whatever a placement brought, if its answer was lost. It is released and never renewed."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Something that a router holds in the registry until it lets go, or dies and it lapses."""

    kind: LeaseKind
    name: str
    """Of a reservation the runner, of a claim what is claimed, of a sequence the entry if known."""
    member: str
    """Of a reservation the sequence, of a claim its owner, of an entry the entry; the sequence."""
    pages: int = 0
    """Reserved pages, given back with a reservation."""
    tenant: str = ""
    """Of a reservation: the tenant that has one running request more by it."""


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
class Aside:
    """Waits, and is not in the queue: room that is free now is not for it, so it blocks nobody."""

    entry: str
    live_runners: int


class Unreachable(Aside):
    """Only runners that this router cannot reach have room."""


class Limited(Aside):
    """Only runners have room that are too small for its adapter."""


class Capped(Aside):
    """Its tenant runs as many requests as it may at a time."""


@dataclass(frozen=True, slots=True)
class Full:
    """No room, and the queue is at its bound."""

    live_runners: int


@dataclass(frozen=True, slots=True)
class TenantFull:
    """No room, and the tenant has as many requests in the queue as it may."""

    limit: int


@dataclass(frozen=True, slots=True)
class Unservable:
    """No runner that is alive could ever serve the adapter; the largest limits among them."""

    max_rank: int
    max_elements: int


Waiting = Queued | Unreachable | Limited | Capped
Outcome = Placed | Waiting | Full | TenantFull | Unservable
