"""Who waits for a runner, in which order and how many, on a real server."""

import asyncio
from collections import Counter

import pytest
from placements import (
    TERMS,
    held_by,
    order_of_turns,
    place_in_queue,
    placed_on,
    queue_up,
    runner,
    seated,
    terms,
    want,
)

from granatum.router.placement.placement import (
    Capped,
    Full,
    Placed,
    Queued,
    TenantFull,
)
from granatum.router.placement.registry import Registry


async def test_the_queue_is_first_come_first_served_within_a_priority_across_routers(
    redis_url: str, fleet: str
) -> None:
    async with Registry(redis_url, fleet, TERMS) as one, Registry(redis_url, fleet, TERMS) as two:
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
    await registry.release([place_in_queue(big.entry)])
    assert await placed_on(registry, "3", entry=small.entry) == "a"


async def test_the_queue_is_bounded_but_not_for_those_admitted_before(registry: Registry) -> None:
    await registry.heartbeat(runner("a", max_batch=1))
    first = await registry.place(want("0"))
    assert isinstance(first, Placed)
    await registry.place(want("again"))
    for n in range(3):
        assert isinstance(await registry.place(want(str(n + 1))), Queued)
    assert await registry.place(want("5")) == Full()
    assert isinstance(await registry.place(want("0", entry=first.entry)), Queued)
    await registry.release([first.reservation])
    assert await placed_on(registry, "0", entry=first.entry) == "a"


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


async def test_tenants_take_turns_and_each_in_its_own_order(long: Registry) -> None:
    held = await seated(long)
    waiting = await queue_up(
        long,
        *((f"a{n}", {"tenant": "a"}) for n in range(12)),
        *((f"b{n}", {"tenant": "b"}) for n in range(12)),
        *((f"c{n}", {"tenant": "c"}) for n in range(12)),
    )
    order = await order_of_turns(long, held, waiting, 20)
    counts = Counter(id_[0] for id_ in order)
    assert all(abs(counts[tenant] - 20 / 3) <= 1 for tenant in "abc")
    for tenant in "abc":
        own = [id_ for id_ in order if id_[0] == tenant]
        assert own == [f"{tenant}{n}" for n in range(len(own))]


async def test_who_waited_and_left_has_had_no_turn(long: Registry) -> None:
    held = await seated(long)
    left = await queue_up(long, *((f"x{n}", {"tenant": "a"}) for n in range(50)))
    await long.release([place_in_queue(request.entry) for request in left.values()])
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
    async with Registry(redis_url, fleet, terms(max_queue=6, max_queued_per_tenant=3)) as registry:
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
    async with Registry(redis_url, fleet, terms(max_running_per_tenant=2)) as registry:
        await registry.heartbeat(runner("a", max_batch=8))
        running = [await registry.place(want(f"a{n}", tenant="a")) for n in range(2)]
        third = await registry.place(want("a2", tenant="a"))
        assert isinstance(third, Capped)
        assert await placed_on(registry, "b", tenant="b") == "a"
        assert isinstance(await registry.place(want("a2", tenant="a", entry=third.entry)), Capped)
        assert isinstance(running[0], Placed)
        await registry.release([running[0].reservation])
        assert await placed_on(registry, "a2", tenant="a", entry=third.entry) == "a"
