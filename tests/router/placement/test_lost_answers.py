"""Answers of the registry that nobody waits for any more: they leave nothing behind."""

import asyncio
import random

import pytest
from desks import beat, kept, nothing_kept, opened, waiting
from redis_proxy import wire_to

from granatum.router.placement.placement import Lease, LeaseKind
from granatum.v1.errors import DeadlineExceeded, Overloaded


@pytest.mark.parametrize("seed", range(4))
async def test_calls_cancelled_at_any_moment_leave_nothing_behind(
    redis_url: str, fleet: str, seed: int
) -> None:
    """A hundred a second and more, with leases far longer than the test may take."""
    chance = random.Random(seed)
    async with opened(redis_url, fleet, lease_s=60) as desk:
        await beat(desk.registry, "a", 3)

        async def generate(id_: str) -> None:
            claim = Lease(LeaseKind.CLAIM, f"acme/{id_}", "me")
            await desk.admission.claim(claim, asyncio.get_running_loop().time() + 10)
            try:
                placed = await desk.admit(id_, tenant=id_[0])
                try:
                    await asyncio.sleep(chance.choice([0, 0.001, 0.01]))
                finally:
                    desk.leases.release(placed.reservation)
            finally:
                desk.leases.release(claim)

        async def and_cancel(n: int) -> None:
            await asyncio.sleep(chance.uniform(0, 0.3))
            task = asyncio.create_task(generate(f"{chance.choice('xyz')}{n}"))
            await asyncio.sleep(chance.choice([0, 0.0002, 0.0005, 0.001, 0.003, 0.02]))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(and_cancel(n) for n in range(200)))
        await nothing_kept(redis_url, fleet, 2)
        placed = await asyncio.wait_for(desk.admit("other", tenant="other"), 1)
        assert placed.runner_id == "a"


async def test_a_tiny_deadline_leaves_nothing_behind_and_says_so(
    redis_url: str, fleet: str
) -> None:
    async with wire_to(redis_url) as wire, opened(wire.url, fleet, lease_s=60) as desk:
        await beat(desk.registry, "a", 1)
        wire.flowing.clear()
        with pytest.raises(DeadlineExceeded):
            await desk.admit("1", within_s=0.05)
        with pytest.raises(DeadlineExceeded):
            await desk.admission.claim(
                Lease(LeaseKind.CLAIM, "acme/x", "me"), asyncio.get_running_loop().time() + 0.05
            )
        wire.flowing.set()
        await nothing_kept(redis_url, fleet, 2)


async def test_a_connection_that_breaks_after_the_script_ran_places_once(
    redis_url: str, fleet: str
) -> None:
    async with wire_to(redis_url) as wire, opened(wire.url, fleet, lease_s=60) as desk:
        await beat(desk.registry, "a", 4)
        breaks = 3

        def cut(piece: bytes) -> bytes | None:
            nonlocal breaks
            if breaks and b"placed" in piece:
                breaks -= 1
                return None
            return piece

        wire.damage = cut
        placed = await desk.admit("1")
        assert breaks == 0
        assert await kept(redis_url, fleet) == {"reserved:a": 1, "running:": 1}
        desk.leases.release(placed.reservation)
        await nothing_kept(redis_url, fleet, 2)


async def test_what_is_let_go_while_the_server_is_away_is_free_when_it_is_back(
    redis_url: str, fleet: str
) -> None:
    async with wire_to(redis_url) as wire, opened(wire.url, fleet, lease_s=60) as desk:
        await beat(desk.registry, "a", 4)
        placed = await desk.admit("1")
        wire.damage = lambda _: None
        desk.leases.release(placed.reservation)
        await asyncio.sleep(0.3)
        wire.damage = None
        await nothing_kept(redis_url, fleet, 2)


async def test_a_turn_that_comes_with_the_deadline_is_a_turn_that_came_too_late(
    redis_url: str, fleet: str
) -> None:
    async with wire_to(redis_url) as wire, opened(wire.url, fleet) as desk:
        await beat(desk.registry, "a", 1)
        await desk.admit("1")
        waits = asyncio.create_task(desk.admit("2", within_s=0.7))
        await waiting(desk, 1)
        wire.flowing.clear()  # the poll's try is under way when the deadline comes
        with pytest.raises(Overloaded) as late:
            await waits
        assert late.value.reason == "QUEUE_TIMEOUT"
        wire.flowing.set()
