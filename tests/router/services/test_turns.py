"""Calls are taken in by turns: what is on its way is bounded before any quota can count it."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from raw_http2 import Unfinished
from router_box import Box

from granatum.router.services.turns import Turns
from granatum.v1.errors import DeadlineExceeded, InvalidRequest
from granatum.v1.validation import MAX_PROMPT_BYTES

GENERATE, CHECK = b"/granatum.v1.InferenceService/Generate", b"/grpc.health.v1.Health/Check"
CALLS = 60
Method = Callable[[AsyncIterator[Any], Any], Awaitable[Any]]


class Peer:
    """The context of a call from there."""

    def __init__(self, address: str = "ipv4:10.0.0.1:9") -> None:
        self._address = address

    def peer(self) -> str:
        return self._address


class Kitchen:
    """Answers when told to; knows how many it was asked at a time."""

    def __init__(self) -> None:
        self.open = self.most = 0
        self.go = asyncio.Event()

    async def cook(self, request: str, _: Any) -> str:
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await self.go.wait()
        finally:
            self.open -= 1
        return request


async def one(message: str = "x") -> AsyncIterator[str]:
    yield message


async def never() -> AsyncIterator[str]:
    await asyncio.get_running_loop().create_future()
    yield ""


async def none() -> AsyncIterator[str]:
    nothing: list[str] = []
    for message in nothing:
        yield message


def wrapped(turns: Turns, kitchen: Kitchen, caller: str | None = "acme") -> Method:
    handler: Any = turns.wrap(grpc.unary_unary_rpc_method_handler(kitchen.cook), "/a/b", caller)
    method: Method = handler.stream_unary
    return method


@pytest.mark.parametrize(("path", "named"), [(GENERATE, True), (CHECK, False)])
async def test_messages_that_never_end_take_little_memory(
    box: Box, path: bytes, named: bool
) -> None:
    router = await box.router()
    await box.runner("r1")
    key = box.tenant("evil") if named else None
    await asyncio.sleep(1.1)  # until the key is known
    calls = Unfinished(router.port, path, key, CALLS, MAX_PROMPT_BYTES)
    task = asyncio.create_task(calls.run())
    await asyncio.sleep(2)
    assert CALLS * 1000 < calls.sent < 10 * MAX_PROMPT_BYTES + CALLS * (1 << 16)
    assert len((await box.generate("another tenant")).ids) == 20
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_caller_waits_for_its_own_calls_alone() -> None:
    turns, kitchen, other = Turns(), Kitchen(), Kitchen()
    tasks = [asyncio.ensure_future(wrapped(turns, kitchen)(one(), Peer())) for _ in range(30)]
    other.go.set()
    for caller in ("globex", None):
        assert await asyncio.wait_for(wrapped(turns, other, caller)(one(), Peer()), 1) == "x"
    assert kitchen.open == 8
    kitchen.go.set()
    assert await asyncio.gather(*tasks) == ["x"] * 30
    assert kitchen.most == 8
    assert len(turns) == 0


async def test_a_message_must_come_and_soon() -> None:
    turns, kitchen = Turns(within_s=0.05), Kitchen()
    with pytest.raises(DeadlineExceeded, match="did not arrive within"):
        await wrapped(turns, kitchen)(never(), Peer())
    with pytest.raises(InvalidRequest, match="no message"):
        await wrapped(turns, kitchen)(none(), Peer())
    assert len(turns) == 0


async def test_calls_cancelled_anywhere_keep_no_turn() -> None:
    turns, kitchen = Turns(), Kitchen()
    tasks: list[asyncio.Task[Any]] = []
    for _ in range(300):
        requests = random.choice([one, never])()
        tasks.append(asyncio.ensure_future(wrapped(turns, kitchen)(requests, Peer())))
        if random.random() < 0.7:
            await asyncio.sleep(0)
        random.choice(tasks).cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(turns) == 0
    kitchen.go.set()
    assert await asyncio.wait_for(wrapped(turns, kitchen)(one(), Peer()), 1) == "x"
