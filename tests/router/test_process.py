"""The router as a process: what it imports, says, refuses, and how it stops."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from router_box import CLUSTER_KEY, Box
from scripted_runner import Script, ScriptedRunner, expected_ids

from granatum.v1.errors import Unavailable
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer


def test_it_brings_in_no_torch() -> None:
    heavy = ("torch", "triton", "transformers", "safetensors", "granatum.runner")
    code = (
        "import granatum.router.__main__, sys; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


class Process:
    """A router process of a box's fleet."""

    def __init__(self, box: Box, *changes: str) -> None:
        self.log = box.folder / "router.log"
        arguments = ["--listen", "127.0.0.1:0", "--redis", box.redis_url]
        arguments += ["--store", (box.folder / "store").as_uri(), "--keys", str(box.keys)]
        arguments += ["--model-config", str(box.folder), *changes]
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "granatum.router", *arguments],
                env=os.environ | {"GRANATUM_CLUSTER_KEY": CLUSTER_KEY},
                stderr=log,
            )

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    async def port(self) -> int:
        async with asyncio.timeout(20):
            while True:
                for event in self.events():
                    if event["event"] == "listening":
                        return int(event["port"])
                assert self.child.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)

    async def stopped(self) -> int:
        return await asyncio.to_thread(self.child.wait, 20)


async def nothing_is_reserved(box: Box) -> None:
    """On the runner "a", as another router of the fleet sees it."""
    await box.router()
    await box.runner("a")
    assert {id_: s.reserved for id_, s in (await box.statuses()).items()} == {"a": 0}


async def test_it_stops_when_its_streams_are_done_and_holds_nothing_any_more(box: Box) -> None:
    process = Process(box, "--grace-s", "10", "--heartbeat-s", "0.2")
    address = f"127.0.0.1:{await process.port()}"
    runner = ScriptedRunner("a", box.fingerprint, CLUSTER_KEY, [address])
    runner.script = Script(step_s=0.01)
    async with runner, grpc.aio.insecure_channel(address) as channel:
        request = GenerateRequest(prompt="hello", stop=StopConditions(max_tokens=60))
        call = InferenceServiceStub(channel).Generate(request, metadata=bearer(box.acme))
        responses = aiter(call)
        first = await anext(responses)
        process.child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while not any(event["event"] == "stopping" for event in process.events()):
                await asyncio.sleep(0.01)
        ids = [token.id for token in first.tokens]
        ids += [token.id async for response in responses for token in response.tokens]
        assert ids == expected_ids("hello", 60)
        assert await process.stopped() == 0
    await nothing_is_reserved(box)


async def test_streams_that_outlast_the_grace_end_and_free_their_place(box: Box) -> None:
    process = Process(box, "--grace-s", "0.2", "--heartbeat-s", "0.2")
    address = f"127.0.0.1:{await process.port()}"
    runner = ScriptedRunner("a", box.fingerprint, CLUSTER_KEY, [address])
    runner.script = Script(step_s=0.01)
    async with runner, grpc.aio.insecure_channel(address) as channel:
        request = GenerateRequest(prompt="hello", stop=StopConditions(max_tokens=4000))
        call = InferenceServiceStub(channel).Generate(request, metadata=bearer(box.acme))
        responses = aiter(call)
        await anext(responses)
        process.child.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in responses:
                pass
        error = from_rpc_error(caught.value)
        assert isinstance(error, Unavailable)
        assert error.reason == "ROUTER_STOPPING"
        assert error.retry_after_s
        assert await process.stopped() == 0
    await nothing_is_reserved(box)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model-config", "/nowhere"], "/nowhere does not exist"),
        (["--keys", "/nowhere/keys.json"], "keys file"),
        (["--store", "what://ever"], "store"),
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--tls-cert", "/nowhere/cert"], "certificate and its key"),
        (["--max-queue", "-1"], "--max-queue:"),
        (["--runner-ca", "/nowhere/ca.pem"], "/nowhere/ca.pem"),
        (["--cluster-key", " "], "GRANATUM_CLUSTER_KEY"),
    ],
)
async def test_it_says_what_is_wrong_with_its_settings(
    box: Box, changes: list[str], said: str
) -> None:
    process = Process(box, *changes)
    assert await process.stopped() in (1, 2)
    (event,) = process.events()
    assert event["level"] == "error"
    assert said in json.dumps(event)


async def test_it_waits_for_a_redis_that_is_not_there_yet(box: Box, tmp_path: Path) -> None:
    process = Process(box, "--redis", "redis://127.0.0.1:1/0")
    await process.port()
    process.child.terminate()
    assert await process.stopped() == 0
