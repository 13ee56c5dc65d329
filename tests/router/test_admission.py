"""The line of those who wait, over two routers' admissions on one real server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from granatum.router.admission import Admission
from granatum.router.leases import Leases
from granatum.router.placement import Placed, PlacementRequest
from granatum.router.registry import Registry
from granatum.v1.cluster_pb2 import Runner
from granatum.v1.errors import Overloaded, Unavailable


@dataclass
class Desk:
    """One router's admission."""

    registry: Registry
    leases: Leases
    admission: Admission
    unreachable: set[str]

    async def admit(self, id_: str, within_s: float = 10, **fields: object) -> Placed:
        give_up = asyncio.get_running_loop().time() + within_s
        request = PlacementRequest(id_, tokens=1, **fields)  # type: ignore[arg-type]
        return await self.admission.admit(request, give_up)


@asynccontextmanager
async def opened(redis_url: str, fleet: str) -> AsyncIterator[Desk]:
    unreachable: set[str] = set()
    async with Registry(redis_url, fleet, lease_s=1.0) as registry:
        leases = Leases(registry)
        admission = Admission(registry, leases, lambda: unreachable)
        tasks = [asyncio.create_task(part.run()) for part in (leases, admission)]
        yield Desk(registry, leases, admission, unreachable)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await leases.close()


@pytest.fixture
async def desks(redis_url: str, fleet: str) -> AsyncIterator[tuple[Desk, Desk]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(opened(redis_url, fleet))
        two = await stack.enter_async_context(opened(redis_url, fleet))
        yield one, two


async def beat(registry: Registry, id_: str, max_batch: int) -> None:
    runner = Runner(
        id=id_, address="x:1", max_batch=max_batch, free_pages=100, page_tokens=16, max_context=99
    )
    await registry.heartbeat(runner)


async def waiting(desk: Desk, number: int) -> None:
    async with asyncio.timeout(5):
        while desk.admission.waiting != number:
            await asyncio.sleep(0.005)


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
        await one.admit("1", within_s=0.05)
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
