"""The line of those who wait, over two routers' admissions on one real server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from desks import Desk, beat, opened, waiting

from granatum.router.placement.placement import Placed
from granatum.v1.errors import Overloaded, PreconditionFailed, Unavailable


@pytest.fixture
async def desks(redis_url: str, fleet: str) -> AsyncIterator[tuple[Desk, Desk]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(opened(redis_url, fleet))
        two = await stack.enter_async_context(opened(redis_url, fleet))
        yield one, two


async def test_turns_come_in_order_of_arrival_over_both_routers(desks: tuple[Desk, Desk]) -> None:
    await beat(desks[0].registry, "a", 1)
    held = await desks[0].admit("first")
    order: list[str] = []

    async def take_turn(desk: Desk, id_: str) -> None:
        placed = await desk.admit(id_)
        order.append(id_)
        desk.leases.release(placed.reservation)

    tasks = []
    for n in range(8):
        tasks.append(asyncio.create_task(take_turn(desks[n % 2], str(n))))
        await waiting(desks[n % 2], n // 2 + 1)
    desks[0].leases.release(held.reservation)
    await asyncio.gather(*tasks)
    assert order == [str(n) for n in range(8)]


async def test_who_is_evicted_comes_before_all_who_arrived_later(desks: tuple[Desk, Desk]) -> None:
    one, two = desks
    await beat(one.registry, "a", 1)
    held = await one.admit("first")
    order: list[str] = []

    async def take_turn(desk: Desk, id_: str, entry: str | None = None) -> None:
        placed = await desk.admit(id_, entry=entry)
        order.append(id_)
        desk.leases.release(placed.reservation)

    late = asyncio.create_task(take_turn(two, "late"))
    await waiting(two, 1)
    again = asyncio.create_task(take_turn(one, "first again", held.entry))
    await waiting(one, 1)
    one.leases.release(held.reservation)
    await asyncio.gather(late, again)
    assert order == ["first again", "late"]


async def test_who_leaves_the_line_lets_the_next_one_come(desks: tuple[Desk, Desk]) -> None:
    one, two = desks
    await beat(one.registry, "a", 1)
    held = await one.admit("first")
    leaver = asyncio.create_task(one.admit("leaver"))
    await waiting(one, 1)
    next_ = asyncio.create_task(two.admit("next"))
    await waiting(two, 1)
    leaver.cancel()
    one.leases.release(held.reservation)
    assert (await next_).runner_id == "a"
    assert (len(one.leases), len(two.leases)) == (0, 1)


async def test_a_router_that_cannot_reach_a_runner_keeps_nobody_else_from_it(
    desks: tuple[Desk, Desk],
) -> None:
    one, two = desks
    await beat(one.registry, "a", 2)
    one.unreachable.add("a")
    cut_off = asyncio.create_task(one.admit("cut off"))
    await waiting(one, 1)
    assert (await two.admit("other")).runner_id == "a"
    one.unreachable.clear()
    assert (await cut_off).runner_id == "a"


async def test_a_turn_that_does_not_come_says_why(desks: tuple[Desk, Desk]) -> None:
    one, two = desks
    with pytest.raises(Unavailable) as none:
        await one.admit("1", within_s=0.3)
    assert none.value.reason == "NO_RUNNER"
    await beat(one.registry, "a", 1)
    await one.admit("2")
    with pytest.raises(Overloaded) as full:
        await two.admit("3", within_s=0.05)
    assert full.value.reason == "QUEUE_TIMEOUT"
    assert full.value.retry_after_s


async def test_held_leases_outlive_their_time_and_released_ones_are_gone(
    desks: tuple[Desk, Desk],
) -> None:
    one, _ = desks
    await beat(one.registry, "a", 2)
    placed = [await one.admit("1"), await one.admit("2")]
    one.leases.release(placed[0].reservation)
    one.leases.release(placed[0].reservation)
    end = asyncio.get_running_loop().time() + 1.3  # past the leases' time
    while asyncio.get_running_loop().time() < end:
        await beat(one.registry, "a", 2)
        await asyncio.sleep(0.1)
    assert [status.reserved for status in await one.registry.runners()] == [1]


async def test_it_stops_at_whatever_moment_it_is_cancelled(redis_url: str, fleet: str) -> None:
    """While it connects above all, where the Redis client may swallow a cancellation."""
    for n in range(40):
        async with opened(redis_url, fleet), asyncio.timeout(5):
            await asyncio.sleep(n / 20_000)


async def test_a_capped_tenant_and_a_large_adapter_hold_up_nobody_of_their_own_router(
    redis_url: str, fleet: str
) -> None:
    async with opened(redis_url, fleet, max_running_per_tenant=1) as desk:
        await beat(desk.registry, "small", 3, max_rank=16)
        await beat(desk.registry, "large", 1, max_rank=64)
        running = await desk.admit("a0", tenant="a")
        large = await desk.admit("l0", tenant="l", rank=64)
        assert (running.runner_id, large.runner_id) == ("small", "large")
        capped: list[asyncio.Task[Placed]] = []
        for tenant, rank in (("a", 0), ("a", 0), ("a", 0), ("m", 64), ("m", 64)):
            id_ = f"waits {len(capped)}"
            capped.append(asyncio.create_task(desk.admit(id_, tenant=tenant, rank=rank)))
            await waiting(desk, len(capped))
        assert (await asyncio.wait_for(desk.admit("b", tenant="b"), 2)).runner_id == "small"
        full = asyncio.create_task(desk.admit("c", tenant="c"))
        other = await asyncio.wait_for(full, 2)
        assert other.runner_id == "small"
        late = asyncio.create_task(desk.admit("d", tenant="d"))
        await waiting(desk, 6)
        desk.leases.release(other.reservation)
        assert (await asyncio.wait_for(late, 2)).runner_id == "small"
        desk.leases.release(running.reservation)
        assert (await asyncio.wait_for(capped[0], 2)).runner_id == "small"
        desk.leases.release(large.reservation)
        assert (await asyncio.wait_for(capped[3], 2)).runner_id == "large"
        for task in capped:
            task.cancel()
        await asyncio.gather(*capped, return_exceptions=True)


async def test_a_bound_that_is_reached_is_named(redis_url: str, fleet: str) -> None:
    async with opened(
        redis_url, fleet, max_queue=4, max_queued_per_tenant=2, max_running_per_tenant=1
    ) as desk:
        await beat(desk.registry, "a", 9, max_rank=16)
        await desk.admit("0", tenant="a")
        waits = [asyncio.create_task(desk.admit(f"w{n}", tenant="a")) for n in range(2)]
        await waiting(desk, 2)
        with pytest.raises(Overloaded, match=r"2 requests.*--max-queued-per-tenant") as queue:
            await desk.admit("1", tenant="a")
        assert (queue.value.reason, queue.value.retry_after_s) == ("TENANT_QUEUE", 1.0)
        await desk.admit("2", tenant="b")
        with pytest.raises(Overloaded) as running:
            await desk.admit("3", within_s=0.05, tenant="b")
        assert running.value.reason == "TENANT_RUNNING"
        with pytest.raises(PreconditionFailed, match=r"rank 17.*rank 16") as rank:
            await desk.admit("4", tenant="c", rank=17)
        assert rank.value.reason == "ADAPTER_NOT_SERVABLE"
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
