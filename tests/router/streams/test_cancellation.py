"""Whatever is cancelled, whenever: nothing stays counted, held or reserved."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from router_box import Box
from scripted_runner import Script

from granatum.router.app import RouterApp
from granatum.v1 import adapters_pb2 as pb
from granatum.v1.adapters_pb2_grpc import AdapterServiceStub
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
from granatum.v1.transport import bearer

CALLS = 300
Held = Callable[[RouterApp], int]
HELD: dict[str, Held] = {
    "calls": lambda router: len(router._calls),
    "streams": lambda router: router._calls._quotas.streams,
    "leases": lambda router: len(router._leases),
    "waiting": lambda router: len(router._admission._line),
    "calls to the registry": lambda router: len(router._admission._under_way),
    "sequences": lambda router: sum(
        len(session._sequences)
        for sessions in router._sessions._open.values()
        for session in sessions.values()
    ),
}


async def generated(box: Box, number: int, channel: grpc.aio.Channel) -> None:
    request = GenerateRequest(
        prompt=f"prompt {number}",
        request_id=random.choice(["", f"id-{number % 5}"]),
        stop=StopConditions(max_tokens=random.choice([1, 20, 300])),
    )
    timeout = random.choice([0.001, 0.05, 5.0])
    stub: Any = InferenceServiceStub(channel)
    call = stub.Generate(request, metadata=bearer(box.acme), timeout=timeout)
    async for _ in call:
        if random.random() < 0.01:
            return


async def uploaded(box: Box, number: int, channel: grpc.aio.Channel) -> None:
    async def messages() -> Any:
        header = pb.UploadHeader(name=f"a{number % 3}")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            header.files.add(name=name, size_bytes=1000, sha256="0" * 64)
        yield pb.UploadAdapterRequest(header=header)
        await asyncio.sleep(random.random() / 50)
        yield pb.UploadAdapterRequest(chunk=bytes(10))
        await asyncio.sleep(random.random())

    stub: Any = AdapterServiceStub(channel)
    await stub.UploadAdapter(messages(), metadata=bearer(box.acme), timeout=2)


async def listed(box: Box, number: int, channel: grpc.aio.Channel) -> None:
    stub: Any = AdapterServiceStub(channel)
    await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=bearer(box.acme))


async def harried(doing: Awaitable[None]) -> None:
    """Done, and cancelled at some moment."""
    task = asyncio.ensure_future(doing)
    await asyncio.sleep(random.expovariate(50))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await task


async def gone(router: RouterApp, held: Held) -> bool:
    for _ in range(500):
        if held(router) == 0:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize("seed", range(2))
async def test_calls_cancelled_at_any_moment_leave_nothing(box: Box, seed: int) -> None:
    random.seed(seed)
    routers = [await box.router(), await box.router()]
    for name in "ab":
        script = Script(step_s=0.002, evict_after=random.choice([0, 50]))
        await box.runner(name, max_batch=3, script=script)
    channels = [box.channel(number) for number in range(2)]
    what = (generated, generated, generated, uploaded, listed)
    doings = (random.choice(what)(box, number, channels[number % 2]) for number in range(CALLS))
    await asyncio.gather(*(harried(doing) for doing in doings))
    left = {
        (name, number): held(router)
        for number, router in enumerate(routers)
        for name, held in HELD.items()
        if not await gone(router, held)
    }
    assert left == {}
    await box.idle()
    async with Redis.from_url(box.redis_url, decode_responses=True) as redis:
        prefix = f"{{granatum:{box.fingerprint}}}"
        assert await redis.exists(f"{prefix}:runners")
        for kind in ("reserved", "running", "queued", "waiting", "queue", "claim"):
            keys = [key async for key in redis.scan_iter(f"{prefix}:{kind}*")]
            assert keys == []
