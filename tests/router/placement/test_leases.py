"""What routers hold, until they let go or die, on a real server."""

import asyncio

from placements import TERMS, place_in_queue, placed_on, runner, seated, want

from granatum.router.placement.placement import (
    Lease,
    LeaseKind,
    Placed,
    Queued,
)
from granatum.router.placement.registry import Registry


async def test_reservations_entries_and_runners_lapse(registry: Registry, brief: Registry) -> None:
    await brief.heartbeat(runner("b"))
    await registry.heartbeat(runner("a", max_batch=1))
    await asyncio.sleep(0.06)
    assert [s.runner.id for s in await registry.runners()] == ["a"]
    assert not await registry.alive("b")
    assert await placed_on(brief, "1") == "a"
    assert isinstance(await brief.place(want("2")), Queued)
    await asyncio.sleep(0.06)
    assert await placed_on(registry, "3") == "a"


async def test_renewal_keeps_and_recreates(registry: Registry, brief: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    placed = await brief.place(want("1"))
    queued = await brief.place(want("2"))
    assert isinstance(placed, Placed)
    assert isinstance(queued, Queued)
    await asyncio.sleep(0.06)
    await registry.renew([placed.reservation, place_in_queue(queued.entry)])
    assert [s.reserved for s in await registry.runners()] == [1]
    late = await registry.place(want("3"))
    assert isinstance(late, Queued)
    await registry.release([placed.reservation])
    assert isinstance(await registry.place(want("3", entry=late.entry)), Queued)
    assert await placed_on(registry, "2", entry=queued.entry) == "a"


async def test_a_claim_is_one_owners_until_released(registry: Registry, brief: Registry) -> None:
    one, two = (Lease(LeaseKind.CLAIM, "acme/x", owner) for owner in "12")
    assert await registry.claim(one)
    assert await registry.claim(one)
    assert not await registry.claim(two)
    await registry.release([two])
    assert not await registry.claim(two)
    await registry.release([one])
    assert await brief.claim(two)
    await asyncio.sleep(0.06)
    assert await registry.claim(one)


async def test_the_queue_waits_briefly_for_a_router_that_died(redis_url: str, fleet: str) -> None:
    async with (
        Registry(redis_url, fleet, TERMS) as dead,
        Registry(redis_url, fleet, TERMS) as alive,
    ):
        held = await seated(alive)
        for n in range(5):
            await dead.place(want(f"dead{n}"))
        await alive.release([held.reservation])
        late = await alive.place(want("late"))
        assert isinstance(late, Queued)
        async with asyncio.timeout(2):
            while not isinstance(await alive.place(want("late", entry=late.entry)), Placed):
                await asyncio.sleep(0.05)


async def test_a_router_that_stalled_has_its_places_back(
    registry: Registry, brief: Registry
) -> None:
    held = await seated(registry)
    stalled = await brief.place(want("1"))
    late = await registry.place(want("2"))
    await asyncio.sleep(0.06)
    assert isinstance(stalled, Queued)
    assert isinstance(late, Queued)
    await registry.renew([place_in_queue(stalled.entry)])
    await registry.release([held.reservation])
    assert isinstance(await registry.place(want("2", entry=late.entry)), Queued)
    assert await placed_on(registry, "1", entry=stalled.entry) == "a"
