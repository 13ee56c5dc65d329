"""Clients that do not read, ask for too much, or are still there when the router stops."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from router_box import Box
from scripted_runner import Script, expected_ids, prompt_of, text_of

from granatum.router.app import RouterApp
from granatum.router.streams.remote_sequence import MESSAGE_BYTES
from granatum.v1.errors import GranatumError, Overloaded, Unavailable
from granatum.v1.inference_pb2 import GenerateRequest, GenerateResponse, StopConditions
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer

GREEDY = Script(step_s=0.001, burst=200)
NARROW = (("grpc.http2.bdp_probe", 0),)  # the windows stay at 64 KiB
ENDLESS = 1_000_000

Responses = grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]


@pytest.fixture
async def narrow(box: Box) -> AsyncIterator[grpc.aio.Channel]:
    """A connection that takes little ahead of its reader."""
    router = await box.router(unread_s=0.5)
    address = f"127.0.0.1:{router.port}"
    async with grpc.aio.insecure_channel(address, options=NARROW) as channel:
        yield channel


def ask(box: Box, channel: grpc.aio.Channel, tokens: int = ENDLESS, prompt: str = "x") -> Responses:
    request = GenerateRequest(prompt=prompt, stop=StopConditions(max_tokens=tokens))
    call: Responses = InferenceServiceStub(channel).Generate(request, metadata=bearer(box.acme))
    return call


async def until(router: RouterApp, calls: int) -> None:
    async with asyncio.timeout(10):
        while len(router._calls) != calls:
            await asyncio.sleep(0.01)


async def error_of(call: Responses) -> GranatumError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(call)
    return from_rpc_error(caught.value)


async def drained(call: Responses) -> list[GenerateResponse]:
    return [response async for response in call]


def handlers() -> int:
    """Handlers of Generate under way in this process."""
    return sum(
        t.get_name().startswith("HandleExceptions[/granatum.v1.Inference")
        for t in asyncio.all_tasks()
    )


async def test_streams_that_nobody_reads_hold_no_seat(box: Box, narrow: grpc.aio.Channel) -> None:
    runner = await box.runner("a", max_batch=8, script=GREEDY)
    unread = [ask(box, narrow, prompt=f"prompt {n}") for n in range(8)]
    async with asyncio.timeout(10):
        while runner.cancelled < 8:
            await asyncio.sleep(0.01)
    assert (await box.generate("other")).ids == expected_ids("other", 20)
    await box.idle()
    for call in unread:
        call.cancel()


async def test_who_reads_late_comes_back_behind_those_who_wait(box: Box) -> None:
    router = await box.router()
    runner = await box.runner("a", max_batch=1, script=Script(step_s=0.001, burst=200))
    address = f"127.0.0.1:{router.port}"
    globex = bearer(box.tenant("globex"))
    await asyncio.sleep(1.1)  # until the key is known
    async with grpc.aio.insecure_channel(address, options=NARROW) as channel, asyncio.timeout(15):
        late = ask(box, channel, 30_000, "late")
        while not runner.cancelled:
            await asyncio.sleep(0.01)
        runner.script.stalled = True
        seated = asyncio.create_task(box.generate("seated"))
        while len(runner.submissions) < 2:
            await asyncio.sleep(0.01)
        request = GenerateRequest(prompt="waiting", stop=StopConditions(max_tokens=1))
        waiting = asyncio.create_task(drained(box.inference().Generate(request, metadata=globex)))
        await waiting_at(router, 1)
        reading = asyncio.create_task(drained(late))
        await waiting_at(router, 2)
        runner.script.stalled = False
        await asyncio.gather(seated, waiting, reading)
    assert [prompt_of(s.request) for s in runner.submissions[1:4]] == ["seated", "waiting", "late"]


async def waiting_at(router: RouterApp, number: int) -> None:
    while len(router._admission._line) < number:
        await asyncio.sleep(0.01)


async def test_a_backlog_is_read_on_from_where_the_stream_goes_on_elsewhere(box: Box) -> None:
    router = await box.router()
    runner = await box.runner("a", script=GREEDY)
    address = f"127.0.0.1:{router.port}"
    async with grpc.aio.insecure_channel(address, options=NARROW) as channel:
        call = ask(box, channel, 30_000)
        async with asyncio.timeout(10):
            while not runner.cancelled:
                await asyncio.sleep(0.01)
        responses = await drained(call)
    assert [t.id for r in responses for t in r.tokens] == expected_ids("x", 30_000)
    assert "".join(t.text for r in responses for t in r.tokens) == text_of(
        expected_ids("x", 30_000)
    )
    assert responses[-1].end.timings.resumptions >= 1
    assert max(r.ByteSize() for r in responses) <= MESSAGE_BYTES + 1000
    assert runner.wrong == []


async def test_a_client_that_stays_stuck_is_cut_and_told_so_if_it_ever_reads(
    box: Box, narrow: grpc.aio.Channel
) -> None:
    await box.runner("a", script=GREEDY)
    stuck = ask(box, narrow)
    await until(box.routers[0], 1)
    async with asyncio.timeout(10):
        while handlers():
            await asyncio.sleep(0.05)
    await box.idle()
    assert len(box.routers[0]._calls) == 1  # what gRPC holds for it still counts
    error = await error_of(stuck)
    assert isinstance(error, Overloaded)
    assert error.reason == "SLOW_READER"
    assert error.retry_after_s
    await until(box.routers[0], 0)


async def test_a_stuck_client_that_leaves_is_forgotten(box: Box, narrow: grpc.aio.Channel) -> None:
    await box.runner("a", script=GREEDY)
    calls = [ask(box, narrow, prompt=f"prompt {n}") for n in range(4)]
    await until(box.routers[0], 4)
    async with asyncio.timeout(10):
        while handlers():
            await asyncio.sleep(0.05)
    for call in calls:
        call.cancel()
    await until(box.routers[0], 0)
    assert box.routers[0]._calls._quotas.streams == 0


async def test_a_slow_client_is_not_cut(box: Box, narrow: grpc.aio.Channel) -> None:
    await box.runner("a", script=GREEDY)
    call = ask(box, narrow, 20_000)
    ids: list[int] = []
    async for response in call:
        ids += [t.id for t in response.tokens]
        await asyncio.sleep(0.01)
    assert ids == expected_ids("x", 20_000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_streams_per_tenant": 2}, "TENANT_STREAMS"),
        ({"max_streams": 2}, "ROUTER_STREAMS"),
        ({"max_request_bytes_per_tenant": 2000}, "TENANT_BYTES"),
    ],
)
async def test_too_much_is_refused_by_the_bounds_name_until_there_is_room(
    box: Box, changes: dict[str, int], reason: str
) -> None:
    router = await box.router(**changes)
    await box.runner("a", script=Script(step_s=0.01))
    channel = box.channel()
    prompt = "x" * 900
    first, second = ask(box, channel, prompt=prompt), ask(box, channel, prompt=prompt)
    await first.read()
    await second.read()
    error = await error_of(ask(box, channel, 1, prompt))
    assert isinstance(error, Overloaded)
    assert error.reason == reason
    assert error.retry_after_s
    first.cancel()
    await until(router, 1)
    assert await drained(ask(box, channel, 1, prompt))


async def test_a_request_larger_than_any_valid_one_is_not_even_received(box: Box) -> None:
    await box.router()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await box.generate("x" * (7 << 20))
    assert isinstance(from_rpc_error(caught.value), Overloaded)


@pytest.mark.parametrize("moment", ["running", "waiting"])
async def test_a_router_past_its_grace_sends_its_clients_elsewhere(box: Box, moment: str) -> None:
    router = RouterApp(box.settings(grace_s=0.1))
    box.routers.append(router)
    async with router:
        if moment == "running":
            await box.runner("a", script=Script(step_s=0.01))
        error = asyncio.create_task(error_of(ask(box, box.channel())))
        await until(router, 1)
        if moment == "running":
            async with asyncio.timeout(5):
                while not box.runners["a"].active:
                    await asyncio.sleep(0.01)
    told = await error
    assert isinstance(told, Unavailable)
    assert told.reason == "ROUTER_STOPPING"
    assert told.retry_after_s


async def test_three_thousand_streams_at_once_run_or_are_refused_with_a_hint(box: Box) -> None:
    bound = 200
    await box.router(max_streams_per_tenant=bound, patience_s=60)
    runner = await box.runner("a", max_batch=64, script=Script(stalled=True))
    channel = box.channel()
    streams = [
        asyncio.create_task(drained(ask(box, channel, 3, f"prompt {n}"))) for n in range(3000)
    ]
    async with asyncio.timeout(60):
        while sum(stream.done() for stream in streams) < 3000 - bound:
            await asyncio.sleep(0.05)
    runner.script.stalled = False
    done = await asyncio.gather(*streams, return_exceptions=True)
    errors = [from_rpc_error(e) for e in done if isinstance(e, grpc.aio.AioRpcError)]
    assert {(type(e), e.reason) for e in errors} == {(Overloaded, "TENANT_STREAMS")}
    assert all(e.retry_after_s for e in errors)
    assert len(errors) == 3000 - bound
    for n, answer in enumerate(done):
        if isinstance(answer, list):
            ids = [token.id for response in answer for token in response.tokens]
            assert ids == expected_ids(f"prompt {n}", 3)
    assert runner.peak == 64
