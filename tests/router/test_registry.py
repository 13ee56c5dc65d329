"""Placement, leases and queue order on a real server."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from granatum.router.placement import (
    Full,
    Lease,
    LeaseKind,
    Placed,
    PlacementRequest,
    Queued,
    Unreachable,
)
from granatum.router.registry import Registry
from granatum.v1.cluster_pb2 import Runner
from granatum.v1.errors import Unavailable


def runner(id_: str, **figures: int | bool) -> Runner:
    usual: dict[str, int | bool] = {
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
    return dataclasses.replace(PlacementRequest(id_, tokens=16), **fields)  # type: ignore[arg-type]


async def placed_on(registry: Registry, id_: str, **fields: object) -> str:
    outcome = await registry.place(want(id_, **fields))
    assert isinstance(outcome, Placed), outcome
    return outcome.runner_id


@pytest.fixture
async def brief(redis_url: str, fleet: str) -> AsyncIterator[Registry]:
    """The same fleet with leases that lapse at once."""
    async with Registry(redis_url, fleet, lease_s=0.05, runner_lease_s=0.05) as registry:
        yield registry


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


async def test_excluded_runners_are_the_last_choice_and_avoided_ones_none(
    registry: Registry,
) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    await registry.heartbeat(runner("b"))
    assert await placed_on(registry, "1", exclude=["b"]) == "a"
    assert await placed_on(registry, "2", exclude=["b"]) == "b"
    assert isinstance(await registry.place(want("3", avoid=["b"])), Unreachable)
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
    assert await placed_on(registry, "2", exclude=["a"]) == "b"
    await registry.heartbeat(runner("a", draining=True))
    assert isinstance(await registry.place(want("4", avoid=["b"])), Unreachable)


async def test_nobody_drains_a_runner_that_does_not_live(registry: Registry) -> None:
    assert not await registry.drain("ghost")
    assert not await registry.resume("ghost")


async def test_a_runner_that_was_draining_when_the_server_forgot_still_is(
    registry: Registry,
) -> None:
    assert await registry.heartbeat(runner("a", draining=True))
    await registry.deregister("a")
    assert not await registry.heartbeat(runner("a"))


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
    await registry.renew([placed.reservation, queued.lease])
    assert [s.reserved for s in await registry.runners()] == [1]
    late = await registry.place(want("3"))
    assert isinstance(late, Queued)
    await registry.release([placed.reservation])
    assert isinstance(await registry.place(want("3", entry=late.entry)), Queued)
    assert await placed_on(registry, "2", entry=queued.entry) == "a"


async def test_the_queue_is_first_come_first_served_within_a_priority_across_routers(
    redis_url: str, fleet: str
) -> None:
    async with Registry(redis_url, fleet) as one, Registry(redis_url, fleet) as two:
        await one.heartbeat(runner("a", max_batch=1))
        held = await one.place(want("0"))
        entries: dict[str, str] = {}
        for id_, priority in (("1", 0), ("2", -1), ("3", 0), ("4", 5), ("5", 0)):
            outcome = await (one, two)[int(id_) % 2].place(want(id_, priority=priority))
            assert isinstance(outcome, Queued)
            entries[id_] = outcome.entry
        order = []
        while entries:
            assert isinstance(held, Placed)
            await two.release([held.reservation])
            outcomes = {
                id_: await one.place(want(id_, entry=entry)) for id_, entry in entries.items()
            }
            (id_,) = (id_ for id_, outcome in outcomes.items() if isinstance(outcome, Placed))
            order.append(id_)
            held = outcomes[id_]
            del entries[id_]
        assert order == ["4", "1", "3", "5", "2"]


async def test_newcomers_do_not_pass_the_queue(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=2, free_pages=4, reclaimable_pages=0))
    await registry.place(want("1", tokens=48))
    big = await registry.place(want("2", tokens=48))
    small = await registry.place(want("3"))
    assert isinstance(big, Queued)
    assert isinstance(small, Queued)
    await registry.release([big.lease])
    assert await placed_on(registry, "3", entry=small.entry) == "a"


async def test_the_queue_is_bounded_but_not_for_those_admitted_before(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    first = await registry.place(want("0"))
    assert isinstance(first, Placed)
    await registry.place(want("again"))
    for n in range(3):
        assert isinstance(await registry.place(want(str(n + 1))), Queued)
    assert await registry.place(want("5")) == Full(live_runners=1)
    assert isinstance(await registry.place(want("0", entry=first.entry)), Queued)
    await registry.release([first.reservation])
    assert await placed_on(registry, "0", entry=first.entry) == "a"


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


@pytest.mark.parametrize("cause", ["release", "heartbeat"])
async def test_whoever_waits_hears_of_room(registry: Registry, cause: str) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    placed = await registry.place(want("1"))
    await registry.place(want("2"))
    assert isinstance(placed, Placed)
    news = registry.news()
    await anext(news)
    if cause == "release":
        await registry.release([placed.reservation])
    else:
        await registry.heartbeat(runner("b"))
    await asyncio.wait_for(anext(news), 5)
    await news.aclose()


async def test_routers_at_once_never_overfill_a_runner(redis_url: str, fleet: str) -> None:
    async with Registry(redis_url, fleet) as one, Registry(redis_url, fleet) as two:
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


async def test_a_server_that_is_away_is_unavailable(fleet: str) -> None:
    async with Registry("redis://127.0.0.1:1", fleet) as registry:
        with pytest.raises(Unavailable) as caught:
            await registry.place(want("1"))
        assert caught.value.retry_after_s is not None
