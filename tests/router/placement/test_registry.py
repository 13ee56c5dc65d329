"""Which runners there are, on a real server."""

import asyncio

import pytest
from placements import TERMS, placed_on, runner, want
from redis.asyncio import Redis

from granatum.router.placement.registry import Registry
from granatum.v1.errors import PreconditionFailed, Unavailable


async def test_nobody_drains_a_runner_that_does_not_live(registry: Registry) -> None:
    assert not await registry.drain("ghost")
    assert not await registry.resume("ghost")


async def test_a_runner_that_was_draining_when_the_server_forgot_still_is(
    registry: Registry,
) -> None:
    assert await registry.heartbeat(runner("a", draining=True))
    await registry.deregister("a")
    assert not await registry.heartbeat(runner("a"))


async def test_a_server_that_is_away_is_unavailable(fleet: str) -> None:
    async with Registry("redis://127.0.0.1:1", fleet, TERMS) as registry:
        with pytest.raises(Unavailable) as caught:
            await registry.place(want("1"))
        assert caught.value.retry_after_s is not None


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
