"""A front behind a real gRPC server, with an engine that the test plays over a real channel."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from granatum.runner.channel import AsyncChannel, socket_pair
from granatum.runner.front.adapter_chats import AdapterChats
from granatum.runner.front.front import Front
from granatum.runner.front.servicer import RunnerServicer
from granatum.runner.records import (
    Cancel,
    Command,
    EngineFigures,
    Ready,
    Report,
    SequenceNews,
    StepReport,
    Submit,
)
from granatum.runner.text.tokenizer import Tokenizer
from granatum.service.server import build_server, listen
from granatum.v1.inference_pb2 import GenerateRequest
from granatum.v1.runner_pb2 import SequenceOutput, SessionRequest, SessionResponse, SubmitSequence
from granatum.v1.runner_pb2_grpc import RunnerServiceStub, add_RunnerServiceServicer_to_server
from granatum.v1.transport import bearer

KEY = "cluster-key"
BOS = 257


FIGURES = EngineFigures(0, 100, 100, 0, 0, 0, 0, 0)


READY = Ready(max_batch=4, page_tokens=16, max_context=256, figures=FIGURES)


Stream = grpc.aio.StreamStreamCall[SessionRequest, SessionResponse]


@dataclass
class Runner:
    """A front behind a server, and the test's end of the channel as its engine."""

    front: Front
    engine: AsyncChannel[Report, Command]
    address: str
    relay: asyncio.Task[object]
    routers: list[grpc.aio.Channel] = field(default_factory=list)

    def session(self, key: str = KEY) -> Stream:
        channel = grpc.aio.insecure_channel(self.address)
        self.routers.append(channel)
        return RunnerServiceStub(channel).Session(metadata=bearer(key))

    def report(self, *news: SequenceNews, resident: tuple[str, ...] | None = None) -> None:
        self.engine.send(StepReport(news, FIGURES, resident))

    async def submitted(self) -> Submit:
        command = await asyncio.wait_for(self.engine.receive(), 5)
        assert isinstance(command, Submit)
        return command

    async def cancelled(self) -> int:
        command = await asyncio.wait_for(self.engine.receive(), 5)
        assert isinstance(command, Cancel)
        return command.sequence_id


@asynccontextmanager
async def started(tokenizer: Tokenizer, chats: AdapterChats | None = None) -> AsyncIterator[Runner]:
    ours, theirs = socket_pair()
    front = Front(await AsyncChannel.open(ours), tokenizer, 259, chats)
    server = build_server(["granatum.v1.RunnerService"])
    add_RunnerServiceServicer_to_server(RunnerServicer(front, KEY), server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    relay = asyncio.create_task(front.run())
    runner = Runner(front, await AsyncChannel.open(theirs), f"127.0.0.1:{port}", relay)
    try:
        yield runner
    finally:
        relay.cancel()
        await asyncio.gather(relay, return_exceptions=True)
        for router in runner.routers:
            await router.close()
        await server.stop(None)
        runner.engine.close()


def submission(sequence_id: int, request: GenerateRequest, **more: object) -> SessionRequest:
    message = SubmitSequence(sequence_id=sequence_id, request=request, **more)  # type: ignore[arg-type]
    return SessionRequest(submit=message)


def asks(prompt: str = "hi", **more: object) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, **more)  # type: ignore[arg-type]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def outputs(stream: Stream) -> list[SequenceOutput]:
    while True:
        response = await asyncio.wait_for(stream.read(), 5)
        assert isinstance(response, SessionResponse)
        if response.outputs:  # otherwise it is a sign of life
            return list(response.outputs)
