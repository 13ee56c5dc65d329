"""Runners, requests and turns, for tests of the registry."""

import dataclasses
from collections.abc import Mapping

from granatum.router.placement.placement import (
    Lease,
    LeaseKind,
    Placed,
    PlacementRequest,
    Queued,
    Terms,
)
from granatum.router.placement.registry import Registry
from granatum.v1.cluster_pb2 import Runner

TERMS = Terms(
    lease_s=6.0,
    runner_lease_s=4.0,
    max_queue=1024,
    max_queued_per_tenant=512,
    max_running_per_tenant=0,
)


def terms(**changes: float) -> Terms:
    """The usual terms with some of them changed."""
    return dataclasses.replace(TERMS, **changes)  # type: ignore[arg-type]


def runner(id_: str, **figures: int | bool | str) -> Runner:
    """A runner with room, by its id; its address follows from the id."""
    usual: dict[str, int | bool | str] = {
        "max_batch": 4,
        "total_pages": 100,
        "free_pages": 60,
        "reclaimable_pages": 40,
        "page_tokens": 16,
        "max_context": 1600,
    }
    address = f"127.0.0.1:{sum(id_.encode())}"
    return Runner(id=id_, address=address, **(usual | figures))  # type: ignore[arg-type]


def want(id_: str, **fields: object) -> PlacementRequest:
    """A request of one page."""
    return dataclasses.replace(PlacementRequest(id_, tokens=16), **fields)  # type: ignore[arg-type]


def place_in_queue(entry: str | None) -> Lease:
    """The lease that keeps an entry's place in the queue."""
    assert entry
    return Lease(LeaseKind.ENTRY, "", entry)


async def placed_on(registry: Registry, id_: str, **fields: object) -> str:
    """The runner that gets a request, which must be placed at once."""
    outcome = await registry.place(want(id_, **fields))
    assert isinstance(outcome, Placed), outcome
    return outcome.runner_id


async def seated(registry: Registry, tenant: str = "holder") -> Placed:
    """The one seat of the only runner, taken."""
    await registry.heartbeat(runner("a", max_batch=1))
    held = await registry.place(want("held", tenant=tenant))
    assert isinstance(held, Placed)
    return held


async def queue_up(
    registry: Registry, *wanted: tuple[str, Mapping[str, object]]
) -> dict[str, PlacementRequest]:
    """Requests that must wait, by their ids."""
    waiting = {}
    for id_, fields in wanted:
        outcome = await registry.place(want(id_, **fields))
        assert isinstance(outcome, Queued), outcome
        waiting[id_] = want(id_, **fields, entry=outcome.entry)
    return waiting


async def order_of_turns(
    registry: Registry, held: Placed, waiting: dict[str, PlacementRequest], turns: int
) -> list[str]:
    """The ids that get a seat, which is given back at once, in their order."""
    order = []
    for _ in range(turns):
        await registry.release([held.reservation])
        for id_, request in waiting.items():
            outcome = await registry.place(request)
            if isinstance(outcome, Placed):
                order.append(id_)
                held = outcome
                del waiting[id_]
                break
    return order


def held_by(held: Placed, member: str = "held") -> Placed:
    """The one seat, held by another sequence now."""
    return dataclasses.replace(
        held, reservation=dataclasses.replace(held.reservation, member=member)
    )
