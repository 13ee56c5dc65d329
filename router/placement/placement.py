"""What routers ask of the registry and what it answers: placements, queue entries, leases."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

_ENTRY_LEASE_S = 1.5


@dataclass(frozen=True, slots=True)
class Terms:
    """How long the registry's leases hold, in seconds, and how many requests may wait or run."""

    lease_s: float
    """The lease of a router's reservations and claims."""
    runner_lease_s: float
    """The lease of a runner, from its last heartbeat."""
    max_queue: int
    """The most requests in the queue; up to twice as many, if each is its tenant's only one."""
    max_queued_per_tenant: int
    max_running_per_tenant: int
    """The most requests of one tenant that hold a reservation; 0: no bound."""

    @property
    def entry_lease_s(self) -> float:
        """The lease of an entry in the queue.

        The lease is short, because the whole queue waits until a dead router's entry lapses. A
        router that only stalled gets its places back.
        """
        return min(self.lease_s, _ENTRY_LEASE_S)


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """A sequence that wants a runner."""

    id: str
    """Unique in the fleet; the reservation has this name."""
    tokens: int
    """Tokens of prompt and output so far, estimated or known. A runner must have pages for all."""
    priority: int = 0
    entry: str | None = None
    """Its place in the queue's order, given by the first attempt and kept for life.

    A sequence that lost its runner because its client did not read has none: it queues anew.
    """
    admitted: bool = False
    """Whether the sequence was placed before. Then the bounds of the queue do not apply to it."""
    avoid: Collection[str] = ()
    """Runners that just sent this sequence back. One is taken only if no other has room."""
    unreachable: Collection[str] = ()
    """Runners that this router cannot reach. None of them is taken."""
    tenant: str = ""
    """The tenant of the request. Tenants take turns."""
    adapter: bool = False
    """Whether the sequence needs an adapter."""
    rank: int = 0
    """The adapter's rank. A runner with a lower limit is never taken."""
    elements: int = 0
    """The adapter's elements. A runner that can never hold them all is never taken."""


class LeaseKind(Enum):
    """What a lease keeps."""

    RESERVATION = "reservation"
    ENTRY = "entry"
    CLAIM = "claim"
    SEQUENCE = "sequence"
    """What a placement with a lost answer may have brought. It is released and never renewed."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Something that a router holds in the registry until the router releases it or dies."""

    kind: LeaseKind
    name: str
    """RESERVATION: the runner. CLAIM: what is claimed. SEQUENCE: its entry, if known. ENTRY: ""."""
    member: str
    """RESERVATION and SEQUENCE: the sequence. CLAIM: the owner. ENTRY: the entry."""
    pages: int = 0
    """RESERVATION: the pages that are given back with it."""
    tenant: str = ""
    """RESERVATION: the tenant, which has one more running request."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A runner has reserved room."""

    runner_id: str
    address: str
    entry: str
    reservation: Lease


@dataclass(frozen=True, slots=True)
class Queued:
    """There is no room now, or others come first. The sequence waits in the queue."""

    entry: str
    live_runners: int


@dataclass(frozen=True, slots=True)
class Aside:
    """The sequence waits beside the queue. Free room does not suit it, so it blocks nobody."""

    entry: str


class Unreachable(Aside):
    """Only runners that this router cannot reach have room."""


class Limited(Aside):
    """Only runners have room that are too small for its adapter."""


class Capped(Aside):
    """Its tenant runs as many requests as it may at a time."""


@dataclass(frozen=True, slots=True)
class Full:
    """No room, and the queue is at its bound."""


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
PlacementOutcome = Placed | Waiting | Full | TenantFull | Unservable
