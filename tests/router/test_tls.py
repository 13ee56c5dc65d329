"""Mutual TLS between client, router and runner, by the settings alone."""

from pathlib import Path

import grpc
import pytest
from certificates import LOCALHOST, Authority
from cluster import free_port
from router_box import CLUSTER_KEY, Box
from scripted_runner import ScriptedRunner, expected_ids

from granatum.v1.errors import InvalidRequest
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
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
