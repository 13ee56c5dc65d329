"""Users of the whole service in a process of their own, through the router or past it."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from latencies import Record
from traffic import Request, User

from granatum.client.client import Client
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions, TokenIds
from granatum.v1.runner_pb2 import (
    CancelSequence,
    Ping,
    SequenceOutput,
    SessionRequest,
    SubmitSequence,
)
from granatum.v1.runner_pb2_grpc import RunnerServiceStub
from granatum.v1.transport import bearer, open_channel

NumberedUser = tuple[int, User]
_SIGN_OF_LIFE_S = 1.0
"""Runners end a session that is silent for long."""


class Route(Protocol):
    """A way to a runner."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    def tokens(self, prompt: list[int], request: Request) -> AsyncGenerator[int]:
        """How many more tokens there are, each time that some come."""
        ...


@dataclass
class ThroughRouter:
    """The public service, with the client that users have; adapter i is called `adapter-i`."""

    address: str
    key: str

    async def __aenter__(self) -> Self:
        self._client = Client(self.address, key=self.key)
        await self._client.list_adapters()  # so that the connection is there
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def tokens(self, prompt: list[int], request: Request) -> AsyncGenerator[int]:
        """One by one."""
        adapter = "" if request.adapter is None else f"adapter-{request.adapter}"
        async for _ in self._client.generate(
            prompt, adapter=adapter, max_tokens=request.output, ignore_eos=True
        ):
            yield 1


@dataclass
class PastRouter:
    """A session with the runner itself; adapter i has the digest `digests[i]`."""

    address: str
    cluster_key: str
    digests: tuple[str, ...]
    at_a_time: int
    """More than these would be refused."""

    async def __aenter__(self) -> Self:
        self._commands: asyncio.Queue[SessionRequest] = asyncio.Queue()
        self._sequences: dict[int, asyncio.Queue[SequenceOutput]] = {}
        self._turns = asyncio.Semaphore(self.at_a_time)
        self._channel = open_channel(self.address)
        await self._channel.channel_ready()
        self._relay = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._relay.cancel()
        await self._channel.close()

    async def tokens(self, prompt: list[int], request: Request) -> AsyncGenerator[int]:
        """As many as the runner sends together."""
        async with self._turns:
            number = len(self._sequences) + 1
            news = self._sequences[number] = asyncio.Queue()
            submission = self._submission(number, prompt, request)
            self._commands.put_nowait(SessionRequest(submit=submission))
            try:
                async with aclosing(_until_finished(news)) as counts:
                    async for count in counts:
                        yield count
            finally:
                cancel = CancelSequence(sequence_id=number)
                self._commands.put_nowait(SessionRequest(cancel=cancel))

    def _submission(self, number: int, prompt: list[int], request: Request) -> SubmitSequence:
        message = GenerateRequest(
            token_ids=TokenIds(ids=prompt),
            stop=StopConditions(max_tokens=request.output, ignore_eos=True),
        )
        digest = "" if request.adapter is None else self.digests[request.adapter]
        return SubmitSequence(sequence_id=number, adapter_digest=digest, request=message)

    async def _run(self) -> None:
        stub = RunnerServiceStub(self._channel)
        metadata = bearer(self.cluster_key)
        async for response in stub.Session(self._outgoing(), metadata=metadata):
            for output in response.outputs:
                self._sequences[output.sequence_id].put_nowait(output)

    async def _outgoing(self) -> AsyncIterator[SessionRequest]:
        while True:
            try:
                yield await asyncio.wait_for(self._commands.get(), _SIGN_OF_LIFE_S)
            except TimeoutError:
                yield SessionRequest(ping=Ping())


async def _until_finished(news: asyncio.Queue[SequenceOutput]) -> AsyncGenerator[int]:
    while True:
        output = await news.get()
        if output.tokens:
            yield len(output.tokens)
        if output.WhichOneof("outcome"):
            assert output.HasField("finished"), output
            return


@dataclass(frozen=True)
class Work:
    """What one process does: from `begin`, of the monotonic clock, and for `seconds` at most."""

    route: ThroughRouter | PastRouter
    users: tuple[NumberedUser, ...]
    vocab: int
    begin: float
    seconds: float | None


def drive(work: Work) -> list[Record]:
    """Be these users; a process's main."""
    return asyncio.run(_drive(work))


async def _drive(work: Work) -> list[Record]:
    records: list[Record] = []
    async with work.route as route:
        tasks = [
            asyncio.create_task(_be(route, work, number, user, records))
            for number, user in work.users
        ]
        left = None
        if work.seconds is not None:
            left = work.begin + work.seconds - time.monotonic()
        _, late = await asyncio.wait(tasks, timeout=left)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()
    return records


async def _be(route: Route, work: Work, number: int, user: User, records: list[Record]) -> None:
    rng = np.random.default_rng(number)
    for index, request in enumerate(user):
        prompt = rng.integers(3, work.vocab, request.prompt).tolist()
        await asyncio.sleep(max(work.begin + request.arrival - time.monotonic(), 0))
        record = Record(number, index, request, time.monotonic())
        records.append(record)
        async with aclosing(route.tokens(prompt, request)) as tokens:
            async for count in tokens:
                record.times += [time.monotonic()] * count
