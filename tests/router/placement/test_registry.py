"""Placement, leases and queue order on a real server."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Mapping

import pytest
from redis.asyncio import Redis

from granatum.router.placement.placement import (
    Capped,
    Full,
    Lease,
    LeaseKind,
    Limited,
    Placed,
    PlacementRequest,
    Queued,
    TenantFull,
    Unreachable,
    Unservable,
)
from granatum.router.placement.registry import Registry
from granatum.v1.cluster_pb2 import Runner
from granatum.v1.errors import PreconditionFailed, Unavailable


def runner(id_: str, **figures: int | bool | str) -> Runner:
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


async def test_a_placement_asked_twice_is_one(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=1, free_pages=9, reclaimable_pages=0))
    first = await registry.place(want("1"))
    assert await registry.place(want("1")) == first
    assert [s.reserved for s in await registry.runners()] == [1]
    queued = [await registry.place(want("2")) for _ in range(9)]  # the queue takes four
    assert len(set(queued)) == 1
    assert isinstance(queued[0], Queued)
    await registry.release([queued[0].lease])
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


async def queue_up(
    registry: Registry, *wanted: tuple[str, Mapping[str, object]]
) -> dict[str, PlacementRequest]:
    waiting = {}
    for id_, fields in wanted:
        outcome = await registry.place(want(id_, **fields))
        assert isinstance(outcome, Queued), outcome
        waiting[id_] = want(id_, **fields, entry=outcome.entry)
    return waiting


def held_by(held: Placed, member: str = "held") -> Placed:
    """The one seat, held by another sequence now."""
    return dataclasses.replace(
        held, reservation=dataclasses.replace(held.reservation, member=member)
    )


@pytest.fixture
async def long(redis_url: str, fleet: str) -> AsyncIterator[Registry]:
    """The same fleet with a queue for a thousand."""
    async with Registry(redis_url, fleet) as registry:
        yield registry


async def seated(registry: Registry, tenant: str = "holder") -> Placed:
    await registry.heartbeat(runner("a", max_batch=1))
    held = await registry.place(want("held", tenant=tenant))
    assert isinstance(held, Placed)
    return held


@pytest.mark.parametrize("served", [0, 7])
async def test_a_tenants_five_hundred_do_not_hold_up_anothers_one(
    long: Registry, served: int
) -> None:
    held = await seated(long, "a")
    many = await queue_up(long, *((f"a{n}", {"tenant": "a"}) for n in range(500)))
    order = await order_of_turns(long, held, many, served)
    assert order == [f"a{n}" for n in range(served)]
    held = held_by(held, *order[-1:])
    one = await queue_up(long, ("b", {"tenant": "b"}))
    # Tries in the order of the queue, as the routers' lines do.
    waiting = dict(sorted((many | one).items(), key=lambda item: item[1].entry or ""))
    order = await order_of_turns(long, held, waiting, 2)
    assert "b" in order


async def test_who_was_placed_before_waits_anew_though_the_queue_is_full(
    registry: Registry,
) -> None:
    await seated(registry, "a")
    await queue_up(registry, *((f"a{n}", {"tenant": "a"}) for n in range(4)))
    assert isinstance(await registry.place(want("a4", tenant="a")), Full)
    again = await registry.place(want("a5", tenant="a", admitted=True))
    assert isinstance(again, Queued)


async def test_tenants_take_turns_by_weight_and_each_in_its_own_order(long: Registry) -> None:
    held = await seated(long)
    waiting = await queue_up(
        long,
        *((f"a{n}", {"tenant": "a", "weight": 2.0}) for n in range(12)),
        *((f"b{n}", {"tenant": "b"}) for n in range(12)),
        *((f"c{n}", {"tenant": "c"}) for n in range(12)),
    )
    order = await order_of_turns(long, held, waiting, 20)
    counts = Counter(id_[0] for id_ in order)
    assert abs(counts["a"] - 10) <= 1
    assert abs(counts["b"] - 5) <= 1
    assert abs(counts["c"] - 5) <= 1
    for tenant in "abc":
        own = [id_ for id_ in order if id_[0] == tenant]
        assert own == [f"{tenant}{n}" for n in range(len(own))]


async def test_who_waited_and_left_has_had_no_turn(long: Registry) -> None:
    held = await seated(long)
    left = await queue_up(long, *((f"x{n}", {"tenant": "a"}) for n in range(50)))
    await long.release(
        [Lease(LeaseKind.ENTRY, "", request.entry or "") for request in left.values()]
    )
    waiting = await queue_up(
        long,
        ("a0", {"tenant": "a"}),
        *((f"b{n}", {"tenant": "b"}) for n in range(3)),
    )
    assert "a0" in await order_of_turns(long, held, waiting, 2)


async def test_a_higher_priority_does_not_shift_the_turns_below_it(long: Registry) -> None:
    held = await seated(long)
    low = await queue_up(long, *((f"a{n}", {"tenant": "a"}) for n in range(20)))
    high = await queue_up(long, *((f"h{n}", {"tenant": "a", "priority": 1}) for n in range(30)))
    assert await order_of_turns(long, held, high, 30) == [f"h{n}" for n in range(30)]
    held = held_by(held, "h29")
    late = await queue_up(long, ("b", {"tenant": "b"}))
    assert "b" in await order_of_turns(long, held, low | late, 2)


async def test_a_tenant_cannot_fill_the_queue_alone(redis_url: str, fleet: str) -> None:
    async with Registry(redis_url, fleet, max_queue=6, max_queued_per_tenant=3) as registry:
        await seated(registry)
        for n in range(3):
            assert isinstance(await registry.place(want(f"a{n}", tenant="a")), Queued)
        assert await registry.place(want("a3", tenant="a")) == TenantFull(3)
        for n in range(3):
            assert isinstance(await registry.place(want(f"b{n}", tenant="b")), Queued)
        # Full, and yet a tenant that has nothing in it is not kept out.
        assert isinstance(await registry.place(want("c0", tenant="c")), Queued)
        assert isinstance(await registry.place(want("c1", tenant="c")), Full)
        for n in range(5):
            assert isinstance(await registry.place(want(f"t{n}", tenant=f"t{n}")), Queued)
        assert isinstance(await registry.place(want("y", tenant="y")), Full)


async def test_a_tenant_that_runs_as_many_as_it_may_waits_and_blocks_nobody(
    redis_url: str, fleet: str
) -> None:
    async with Registry(redis_url, fleet, max_running_per_tenant=2) as registry:
        await registry.heartbeat(runner("a", max_batch=8))
        running = [await registry.place(want(f"a{n}", tenant="a")) for n in range(2)]
        third = await registry.place(want("a2", tenant="a"))
        assert isinstance(third, Capped)
        assert await placed_on(registry, "b", tenant="b") == "a"
        assert isinstance(await registry.place(want("a2", tenant="a", entry=third.entry)), Capped)
        assert isinstance(running[0], Placed)
        await registry.release([running[0].reservation])
        assert await placed_on(registry, "a2", tenant="a", entry=third.entry) == "a"


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
    assert await placed_on(registry, "4", adapter=True, exclude=["c"]) == "b"


async def test_one_of_two_processes_with_one_id_is_refused_and_told_of_both(
    registry: Registry, brief: Registry
) -> None:
    first, second = runner("a", instance="1"), runner("a", instance="2")
    second.address = "elsewhere:1"
    await brief.heartbeat(first)
    with pytest.raises(PreconditionFailed) as refused:
        await registry.heartbeat(second)
    assert refused.value.reason == "DUPLICATE_RUNNER"
    assert first.address in refused.value.message
    assert second.address in refused.value.message
    assert "--runner-id" in refused.value.message
    assert not await registry.deregister("a", "2")
    assert await registry.alive("a")
    await asyncio.sleep(0.06)
    await registry.heartbeat(second)
    assert await registry.deregister("a", "2")
    assert not await registry.alive("a")


async def test_a_restarted_runner_at_its_old_address_is_the_same_one(registry: Registry) -> None:
    await registry.heartbeat(runner("a", instance="1"))
    await registry.heartbeat(runner("a", instance="2"))
    assert [s.runner.instance for s in await registry.runners()] == ["2"]


async def test_the_queue_waits_briefly_for_a_router_that_died(redis_url: str, fleet: str) -> None:
    async with Registry(redis_url, fleet, lease_s=6) as dead, Registry(redis_url, fleet) as alive:
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
    await registry.renew([stalled.lease])
    await registry.release([held.reservation])
    assert isinstance(await registry.place(want("2", entry=late.entry)), Queued)
    assert await placed_on(registry, "1", entry=stalled.entry) == "a"


async def test_a_damaged_record_hides_one_runner(
    registry: Registry, redis_url: str, fleet: str
) -> None:
    await registry.heartbeat(runner("a"))
    await registry.heartbeat(runner("b"))
    async with Redis.from_url(redis_url) as redis:
        await redis.hset(f"{{granatum:{fleet}}}:runner:b", mapping={"record": b"\xff\xff"})
        assert [s.runner.id for s in await registry.runners()] == ["a"]
        await redis.hdel(f"{{granatum:{fleet}}}:runner:b", "page_tokens")
    assert await placed_on(registry, "1") == "a"
