"""Heartbeats to real routers' doubles, and health as a probe sees it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from granatum.runner.front.health import EngineHealth
from granatum.runner.front.heartbeat import Heartbeat
from granatum.service.server import build_server, listen
from granatum.v1.cluster_pb2 import (
    DeregisterRequest,
    DeregisterResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    Runner,
)
from granatum.v1.cluster_pb2_grpc import (
    RegistryServiceServicer,
    add_RegistryServiceServicer_to_server,
)
from granatum.v1.errors import PreconditionFailed, Unavailable
from granatum.v1.transport import bearer_of, open_channel

KEY = "cluster-key"


class Router(RegistryServiceServicer):
    """A router's registry that remembers who called."""

    def __init__(self) -> None:
        self.away = False
        self.drain = False
        self.taken = False
        self.beats: list[Runner] = []
        self.gone: list[str] = []
        self.keys: set[str | None] = set()

    async def Heartbeat(  # noqa: N802
        self, request: HeartbeatRequest, context: Any
    ) -> HeartbeatResponse:
        if self.away:
            raise Unavailable("away")
        if self.taken:
            raise PreconditionFailed("another runner", reason="DUPLICATE_RUNNER")
        self.keys.add(bearer_of(context.invocation_metadata()))
        self.beats.append(request.runner)
        return HeartbeatResponse(interval_s=0.05, drain=self.drain)

    async def Deregister(  # noqa: N802
        self, request: DeregisterRequest, context: Any
    ) -> DeregisterResponse:
        if self.away:
            raise Unavailable("away")
        self.gone.append(request.runner_id)
        return DeregisterResponse()


class Fleet:
    """Two routers and a heartbeat to both."""

    def __init__(self, channels: list[grpc.aio.Channel], routers: list[Router]) -> None:
        self.routers = routers
        self.drains: list[bool] = []
        self.beats = 0
        self.serving = True
        self.draining = False
        self.heartbeat = Heartbeat(channels, KEY, self.figures, self.drains.append)

    def figures(self) -> Runner | None:
        self.beats += 1
        if not self.serving:
            return None
        return Runner(id="r", free_pages=self.beats, draining=self.draining)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.01)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        routers, channels = [Router(), Router()], []
        for router in routers:
            server = build_server(["granatum.v1.RegistryService"])
            add_RegistryServiceServicer_to_server(router, server)
            port = listen(server, "127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            channels.append(await stack.enter_async_context(open_channel(f"127.0.0.1:{port}")))
        fleet = Fleet(channels, routers)
        task = asyncio.create_task(fleet.heartbeat.run())
        yield fleet
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_every_beat_carries_fresh_figures_and_the_key(fleet: Fleet) -> None:
    first, other = fleet.routers
    await fleet.until(lambda: len(first.beats) >= 3)
    pages = [beat.free_pages for beat in first.beats]
    assert pages == sorted(set(pages))
    assert first.keys == {KEY}
    assert not other.beats, "one router is enough"


async def test_another_router_takes_over(fleet: Fleet) -> None:
    first, other = fleet.routers
    await fleet.until(lambda: bool(first.beats))
    first.away = True
    await fleet.until(lambda: len(other.beats) >= 2)
    first.away, other.away = False, True
    before = len(first.beats)
    await fleet.until(lambda: len(first.beats) > before)


async def test_beats_go_on_after_all_were_away(fleet: Fleet) -> None:
    for router in fleet.routers:
        router.away = True
    await asyncio.sleep(0.1)
    for router in fleet.routers:
        router.away = False
    before = len(fleet.routers[0].beats) + len(fleet.routers[1].beats)
    await fleet.until(lambda: sum(len(router.beats) for router in fleet.routers) > before)


async def test_drain_follows_the_routers(fleet: Fleet) -> None:
    await fleet.until(lambda: bool(fleet.drains))
    assert fleet.drains[-1] is False
    fleet.routers[0].drain = True
    await fleet.until(lambda: fleet.drains[-1])
    fleet.routers[0].drain = False
    await fleet.until(lambda: not fleet.drains[-1])


async def test_deregistration_finds_a_router_that_answers(fleet: Fleet) -> None:
    fleet.routers[0].away = True
    await fleet.heartbeat.deregister()
    assert fleet.routers[1].gone == ["r"]


async def test_runner_without_an_engine_is_out_of_sight_until_there_is_one(fleet: Fleet) -> None:
    router = fleet.routers[0]
    await fleet.until(lambda: bool(router.beats))
    fleet.serving = False
    await fleet.until(lambda: router.gone == ["r"])
    before, looks = len(router.beats), fleet.beats
    await fleet.until(lambda: fleet.beats > looks + 3)
    assert len(router.beats) == before
    assert router.gone == ["r"]
    fleet.serving = True
    await fleet.until(lambda: len(router.beats) > before)


async def test_drained_runner_without_an_engine_stays_drained(fleet: Fleet) -> None:
    """To deregister would make the routers forget that it is drained."""
    router = fleet.routers[0]
    fleet.draining = True
    await fleet.until(lambda: any(beat.draining for beat in router.beats))
    fleet.serving = False
    looks = fleet.beats
    await fleet.until(lambda: fleet.beats > looks + 4)
    assert not router.gone


async def test_runner_whose_id_is_taken_says_so_and_waits(fleet: Fleet) -> None:
    for router in fleet.routers:
        router.taken = True
    with structlog.testing.capture_logs() as logs:
        await fleet.until(lambda: any("--runner-id" in entry.get("todo", "") for entry in logs))
        await fleet.heartbeat.deregister()  # as at its end: it would take the other one out
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert (logs[0]["event"], logs[0]["runner_id"]) == ("another live runner has the id", "r")
    assert not any(router.gone for router in fleet.routers)
    for router in fleet.routers:
        router.taken, router.beats = False, []
    await fleet.until(lambda: any(router.beats for router in fleet.routers))


async def test_health_is_what_the_engine_is() -> None:
    serving = [False]
    health = EngineHealth(lambda: serving[0])
    server = build_server([])
    health.add_to(server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    task = asyncio.create_task(health.run())
    try:
        await follow_health(health, port, serving)
    finally:
        task.cancel()
        await server.stop(None)


async def follow_health(health: EngineHealth, port: int, serving: list[bool]) -> None:
    status = health_pb2.HealthCheckResponse
    async with open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(10):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="granatum.v1.RunnerService"))
        seen: list[Any] = []
        for value in (False, True, False, True):
            serving[0] = value
            expected = status.SERVING if value else status.NOT_SERVING
            while not seen or seen[-1] != expected:
                seen.append((await watch.read()).status)
        health.stop()
        assert (await watch.read()).status == status.NOT_SERVING
