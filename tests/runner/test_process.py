"""The runner as a real process: how it ends."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from granatum.examples.tasks import BASE_MODEL
from granatum.service.server import build_server, listen
from granatum.v1 import runner_pb2
from granatum.v1.cluster_pb2 import (
    DeregisterRequest,
    DeregisterResponse,
    HeartbeatRequest,
    HeartbeatResponse,
)
from granatum.v1.cluster_pb2_grpc import (
    RegistryServiceServicer,
    add_RegistryServiceServicer_to_server,
)
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.runner_pb2 import SequenceOutput, SessionRequest, SessionResponse, SubmitSequence
from granatum.v1.runner_pb2_grpc import RunnerServiceStub
from granatum.v1.transport import bearer, open_channel

pytestmark = pytest.mark.system
KEY = "cluster-key"
START_S = 90
Stream = grpc.aio.StreamStreamCall[SessionRequest, SessionResponse]


class Registry(RegistryServiceServicer):
    """Notes who came and who went."""

    def __init__(self) -> None:
        self.registered = asyncio.Event()
        self.events: list[str] = []
        self.address = ""
        self.instances: set[str] = set()

    async def Heartbeat(  # noqa: N802
        self, request: HeartbeatRequest, context: Any
    ) -> HeartbeatResponse:
        self.address = request.runner.address
        self.instances.add(request.runner.instance)
        self.events.append(f"beat {request.runner.id}")
        self.registered.set()
        return HeartbeatResponse(interval_s=0.2)

    async def Deregister(  # noqa: N802
        self, request: DeregisterRequest, context: Any
    ) -> DeregisterResponse:
        self.events.append(f"gone {request.runner_id}")
        return DeregisterResponse()


class Process:
    """A runner's process with its log."""

    def __init__(self, child: asyncio.subprocess.Process, log: Path, registry: Registry) -> None:
        self.child = child
        self.log = log
        self.registry = registry

    @property
    def engine(self) -> psutil.Process:
        """The largest of its children."""
        children = psutil.Process(self.child.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def events(self) -> list[str]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [json.loads(line)["event"] for line in lines]


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Process]:
    registry = Registry()
    server = build_server(["granatum.v1.RegistryService"])
    add_RegistryServiceServicer_to_server(registry, server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    flags = ["--model", str(BASE_MODEL), "--listen", "127.0.0.1:0", "--device", "cpu"]
    flags += ["--router", f"127.0.0.1:{port}", "--store", directory.as_uri(), "--runner-id", "r"]
    flags += ["--cache-dir", str(directory / "cache")]
    log = directory / "log"
    with log.open("wb") as sink:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "granatum.runner", *flags),
            stdout=sink,
            stderr=sink,
            env={**os.environ, "GRANATUM_CLUSTER_KEY": KEY, "OMP_NUM_THREADS": "1"},
        )
    try:
        await asyncio.wait_for(registry.registered.wait(), START_S)
        yield Process(child, log, registry)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        await server.stop(None)


def endless(sequence_id: int = 1) -> SessionRequest:
    stop = StopConditions(ignore_eos=True)
    request = GenerateRequest(prompt="granite>", stop=stop)
    return SessionRequest(submit=SubmitSequence(sequence_id=sequence_id, request=request))


async def test_sigterm_hands_streams_back_and_takes_the_runner_out(tmp_path: Path) -> None:
    async with started(tmp_path) as process:
        engine = process.engine
        async with open_channel(process.registry.address) as channel:
            stream = RunnerServiceStub(channel).Session(metadata=bearer(KEY))
            await stream.write(endless())
            assert await stream.read() is not grpc.aio.EOF
            process.child.send_signal(signal.SIGTERM)
            outputs: list[SequenceOutput] = []
            while isinstance(response := await stream.read(), SessionResponse):
                outputs.extend(response.outputs)
        assert outputs[-1].departed == runner_pb2.DEPARTURE_DRAINED
        assert await asyncio.wait_for(process.child.wait(), 20) == 0
        assert process.registry.events[-1] == "gone r"
        assert not engine.is_running()
        assert process.events()[-1] == "stopped"


async def test_killed_engine_takes_no_stream_with_it_and_comes_back(tmp_path: Path) -> None:
    async with started(tmp_path) as process:
        registry, killed = process.registry, process.engine
        async with open_channel(registry.address) as channel:
            stream = RunnerServiceStub(channel).Session(metadata=bearer(KEY))
            await stream.write(endless())
            assert await stream.read() is not grpc.aio.EOF
            killed.kill()
            assert await departure(stream) == runner_pb2.DEPARTURE_ENGINE_LOST
            async with asyncio.timeout(START_S):
                while "gone r" not in registry.events:
                    await asyncio.sleep(0.02)
                registry.registered.clear()
                await registry.registered.wait()
            stream = RunnerServiceStub(channel).Session(metadata=bearer(KEY))
            await stream.write(endless())
            assert (await first_output(stream)).tokens
        assert process.engine.pid != killed.pid
        (instance,) = registry.instances  # of the process, not of its engine
        assert len(instance) == 16
        assert process.child.returncode is None


async def test_stopped_engine_loses_its_work_and_comes_back_unharmed(tmp_path: Path) -> None:
    async with started(tmp_path) as process:
        registry, engine = process.registry, process.engine
        async with open_channel(registry.address) as channel:
            stream = RunnerServiceStub(channel).Session(metadata=bearer(KEY))
            await stream.write(endless())
            assert await stream.read() is not grpc.aio.EOF
            engine.suspend()
            assert await departure(stream) == runner_pb2.DEPARTURE_ENGINE_LOST
            await stream.write(endless(2))
            assert await departure(stream) == runner_pb2.DEPARTURE_REFUSED
            async with asyncio.timeout(20):
                while registry.events[-1] != "gone r":
                    await asyncio.sleep(0.02)
            engine.resume()
            async with asyncio.timeout(20):
                while registry.events[-1] != "beat r":
                    await asyncio.sleep(0.02)
            await stream.write(endless(3))
            assert (await first_output(stream)).sequence_id == 3
        assert process.engine.pid == engine.pid


async def first_output(stream: Stream) -> SequenceOutput:
    """The first that is no sign of life."""
    async with asyncio.timeout(20):
        while isinstance(response := await stream.read(), SessionResponse):
            if response.outputs:
                return response.outputs[0]
    raise AssertionError("the session has ended")


async def departure(stream: Stream) -> int:
    """How the stream's only sequence leaves."""
    while isinstance(response := await stream.read(), SessionResponse):
        for output in response.outputs:
            if output.departed:
                return output.departed
    raise AssertionError("the session has ended")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--device", "cpu", "--arena-bytes", "1000"), "give it more memory"),
        (("--device", "cuda:63"), "there is no cuda:63 here"),
    ],
)
async def test_last_log_line_says_why_the_engine_cannot_start(
    tmp_path: Path, flags: tuple[str, ...], why: str
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "granatum.runner", "--model", str(BASE_MODEL), *flags]
    command += ["--listen", "127.0.0.1:0", "--router", "127.0.0.1:1"]
    command += ["--store", tmp_path.as_uri(), "--cache-dir", str(tmp_path / "cache")]
    with log.open("wb") as sink:
        child = await asyncio.create_subprocess_exec(
            *command, stdout=sink, stderr=sink, env={**os.environ, "GRANATUM_CLUSTER_KEY": KEY}
        )
        assert await asyncio.wait_for(child.wait(), START_S) == 1
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["event"] == "cannot serve"
    assert last["error"].startswith("the engine cannot start: ")
    assert why in last["error"].lower()


async def test_engine_ends_when_the_front_is_killed(tmp_path: Path) -> None:
    async with started(tmp_path) as process:
        engine = process.engine
        process.child.kill()
        await process.child.wait()
        await asyncio.to_thread(psutil.wait_procs, [engine], 20)
        assert not engine.is_running()
