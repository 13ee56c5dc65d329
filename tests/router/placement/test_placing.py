"""Which runner gets a request, on a real server."""

import asyncio
from collections import Counter

import pytest
from placements import TERMS, place_in_queue, placed_on, runner, want

from granatum.router.placement.placement import (
    Lease,
    LeaseKind,
    Limited,
    Placed,
    Queued,
    Unreachable,
    Unservable,
)
from granatum.router.placement.registry import Registry
from granatum.v1.errors import Unavailable


async def test_the_largest_working_set_with_room_is_chosen_and_ties_go_to_the_highest_id(
    registry: Registry,
) -> None:
    for id_ in ("a", "c", "b"):
        await registry.heartbeat(runner(id_, max_batch=3))
    placed = [await placed_on(registry, str(n)) for n in range(9)]
    assert placed == ["c"] * 3 + ["b"] * 3 + ["a"] * 3


async def test_a_release_makes_room_again_on_the_runner_it_left(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=2))
    first = await registry.place(want("1"))
    await registry.place(want("2"))
    assert isinstance(await registry.place(want("3")), Queued)
    assert isinstance(first, Placed)
    await registry.release([first.reservation])
    assert await placed_on(registry, "3", entry=first.entry) == "a"


async def test_pages_reserved_since_the_last_heartbeat_count_and_come_back(
    registry: Registry,
) -> None:
    await registry.heartbeat(runner("a", free_pages=3, reclaimable_pages=2))
    first = await registry.place(want("1", tokens=48))
    assert isinstance(first, Placed)
    assert first.reservation.pages == 3
    assert isinstance(await registry.place(want("2", tokens=33)), Queued)
    await registry.heartbeat(runner("a", free_pages=3, reclaimable_pages=2))
    second = await registry.place(want("3", tokens=80, priority=1))
    assert isinstance(second, Placed)
    await registry.release([second.reservation])
    assert await placed_on(registry, "4", tokens=80, priority=1) == "a"


async def test_an_idle_runner_takes_any_prompt_whatever_it_said_last(registry: Registry) -> None:
    await registry.heartbeat(runner("a", free_pages=1, reclaimable_pages=1))
    assert await placed_on(registry, "1", tokens=10_000) == "a"
    assert isinstance(await registry.place(want("2", tokens=33)), Queued)


async def test_avoided_runners_are_the_last_choice_and_unreachable_ones_none(
    registry: Registry,
) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    await registry.heartbeat(runner("b"))
    assert await placed_on(registry, "1", avoid=["b"]) == "a"
    assert await placed_on(registry, "2", avoid=["b"]) == "b"
    assert isinstance(await registry.place(want("3", unreachable=["b"])), Unreachable)
    assert await placed_on(registry, "4") == "b"


async def test_draining_runners_get_nothing(registry: Registry) -> None:
    await registry.heartbeat(runner("a"))
    await registry.heartbeat(runner("b"))
    assert await registry.drain("b")
    assert await registry.heartbeat(runner("b"))
    assert await placed_on(registry, "1") == "a"
    assert [s.runner.draining for s in await registry.runners()] == [False, True]
    assert await registry.resume("b")
    assert not await registry.heartbeat(runner("b"))
    assert await placed_on(registry, "2", avoid=["a"]) == "b"
    await registry.heartbeat(runner("a", draining=True))
    assert isinstance(await registry.place(want("4", unreachable=["b"])), Unreachable)


async def test_routers_at_once_never_overfill_a_runner(redis_url: str, fleet: str) -> None:
    async with Registry(redis_url, fleet, TERMS) as one, Registry(redis_url, fleet, TERMS) as two:
        for id_, room in (("a", 40), ("b", 50), ("c", 60)):
            await one.heartbeat(
                runner(id_, max_batch=room, free_pages=1000, reclaimable_pages=1000)
            )
        outcomes = await asyncio.gather(
            *((one, two)[n % 2].place(want(str(n))) for n in range(200))
        )
        placed = Counter(o.runner_id for o in outcomes if isinstance(o, Placed))
        assert placed == {"a": 40, "b": 50, "c": 60}
        assert sum(isinstance(o, Queued) for o in outcomes) == 50
        assert {s.runner.id: s.reserved for s in await two.runners()} == placed


async def test_no_runner_gets_an_adapter_beyond_its_limits(registry: Registry) -> None:
    await registry.heartbeat(runner("small", max_rank=16, max_adapter_elements=1000, max_batch=1))
    await registry.heartbeat(runner("large", max_rank=64, max_adapter_elements=9000, max_batch=1))
    assert await placed_on(registry, "1", rank=64, elements=9000) == "large"
    waits = await registry.place(want("2", rank=17))
    assert isinstance(waits, Limited)
    assert isinstance(await registry.place(want("3", elements=1001)), Limited)
    assert await placed_on(registry, "4", rank=16, elements=1000) == "small"
    for wanted in ({"rank": 65}, {"elements": 9001}):
        assert await registry.place(want("5", **wanted)) == Unservable(64, 9000)
    await registry.deregister("large")
    # Who was admitted before waits for a large one to come back; newcomers are told.
    assert isinstance(await registry.place(want("2", rank=17, entry=waits.entry)), Queued | Limited)
    assert await registry.place(want("5", rank=17)) == Unservable(16, 1000)
    await registry.heartbeat(runner("unknown"))
    assert await placed_on(registry, "6", priority=1, rank=65, elements=9001) == "unknown"


async def test_a_runner_in_trouble_gets_an_adapter_only_if_no_other_has_room(
    registry: Registry,
) -> None:
    await registry.heartbeat(runner("b", trouble="disk full"))
    await registry.heartbeat(runner("a", max_batch=1))
    assert await placed_on(registry, "1") == "b"
    assert await placed_on(registry, "2", adapter=True) == "a"
    assert await placed_on(registry, "3", adapter=True) == "b"
    await registry.heartbeat(runner("c"))
    assert await placed_on(registry, "4", adapter=True, avoid=["c"]) == "b"


async def test_a_placement_asked_twice_is_one(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=1, free_pages=9, reclaimable_pages=0))
    first = await registry.place(want("1"))
    assert await registry.place(want("1")) == first
    assert [s.reserved for s in await registry.runners()] == [1]
    queued = [await registry.place(want("2")) for _ in range(9)]  # the queue takes four
    assert len(set(queued)) == 1
    assert isinstance(queued[0], Queued)
    await registry.release([place_in_queue(queued[0].entry)])
    assert isinstance(first, Placed)
    await registry.release([first.reservation])
    assert await placed_on(registry, "3") == "a"


async def test_whatever_an_unheard_placement_brought_is_released_at_once(
    registry: Registry,
) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    await registry.place(want("unheard"))
    await registry.place(want("head"))
    await registry.release([Lease(LeaseKind.SEQUENCE, "", id_) for id_ in ("unheard", "head")])
    assert await placed_on(registry, "next") == "a"


async def test_a_placement_that_comes_after_its_release_does_nothing(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    await registry.release([Lease(LeaseKind.SEQUENCE, "", "late")])
    with pytest.raises(Unavailable):
        await registry.place(want("late"))
    assert [s.reserved for s in await registry.runners()] == [0]
