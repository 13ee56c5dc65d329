"""Mutual TLS between client, router and runner, by the settings alone."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import LOCALHOST, Authority
from cluster import free_port
from router_box import CLUSTER_KEY, Box
from scripted_runner import ScriptedRunner, expected_ids

from granatum.v1.errors import InvalidRequest, Unavailable
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import Tls, bearer, open_channel


async def generate(box: Box, channel: grpc.aio.Channel) -> list[int]:
    request = GenerateRequest(prompt="hello", stop=StopConditions(max_tokens=5))
    async with channel:
        stub = InferenceServiceStub(channel)
        call = stub.Generate(request, metadata=bearer(box.acme), timeout=5)
        return [token.id async for response in call for token in response.tokens]


async def test_every_hop_speaks_mutual_tls(box: Box, tmp_path: Path) -> None:
    tls = Authority(tmp_path / "authority").issue("everyone")
    files = {"cert": tls.cert, "key": tls.key, "ca": tls.ca}
    router = await box.router(
        **{f"tls_{what}": file for what, file in files.items()},
        **{f"runner_{what}": file for what, file in files.items()},
    )
    await box.runner("a", tls=tls)
    address = f"127.0.0.1:{router.port}"
    assert await generate(box, open_channel(address, tls)) == expected_ids("hello", 5)
    for stranger in (None, Tls(ca=tls.ca)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(box, open_channel(address, stranger))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("damage", ["missing", "no PEM", "another key"])
async def test_files_that_open_no_channel_end_the_routers_start(
    box: Box, tmp_path: Path, damage: str
) -> None:
    tls = Authority(tmp_path / "authority").issue("everyone")
    stranger = Authority(tmp_path / "other").issue("stranger")
    files = {"runner_cert": tls.cert, "runner_key": tls.key, "runner_ca": tls.ca}
    if damage == "missing":
        files["runner_ca"] = tmp_path / "nowhere.pem"
    elif damage == "no PEM":
        garbage = files["runner_ca"] = tmp_path / "garbage.pem"
        garbage.write_text("garbage")
    else:
        files["runner_key"] = stranger.key
    with pytest.raises(InvalidRequest, match=r"pem|key"):
        await box.router(**files)


async def test_files_that_vanish_cost_no_seat_and_are_not_named_to_clients(
    box: Box, tmp_path: Path
) -> None:
    tls = Authority(tmp_path / "authority").issue("everyone")
    assert tls.ca is not None
    await box.router(runner_ca=tls.ca, runner_cert=tls.cert, runner_key=tls.key)
    await box.runner("a", max_batch=8)
    ca = tls.ca.read_bytes()
    tls.ca.unlink()
    done: list[Any] = []
    for _ in range(3):  # more than the runner has seats, never as many at a time
        calls = [box.generate("hello", seconds=1.5) for _ in range(4)]
        done += await asyncio.gather(*calls, return_exceptions=True)
    for error in done:
        assert isinstance(error, grpc.aio.AioRpcError)
        told = from_rpc_error(error)
        assert isinstance(told, Unavailable), told
        assert ".pem" not in told.message
        assert str(tmp_path) not in told.message
        assert told.retry_after_s
    await box.idle()
    tls.ca.write_bytes(ca)


async def test_runners_beside_a_router_of_tls_reach_it_in_plaintext_on_loopback(
    box: Box, tmp_path: Path
) -> None:
    tls = Authority(tmp_path / "authority").issue("router", LOCALHOST)
    loopback = f"127.0.0.1:{free_port()}"
    router = await box.router(tls_cert=tls.cert, tls_key=tls.key, loopback=loopback)
    async with ScriptedRunner("a", box.fingerprint, CLUSTER_KEY, [loopback]) as runner:
        channel = open_channel(f"localhost:{router.port}", Tls(ca=tls.ca))
        assert await generate(box, channel) == expected_ids("hello", 5)
        assert len(runner.submissions) == 1


async def test_the_address_for_runners_beside_a_router_is_on_loopback_alone(box: Box) -> None:
    with pytest.raises(InvalidRequest, match="beyond this machine"):
        await box.router(loopback="0.0.0.0:0")
