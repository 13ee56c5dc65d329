"""Mutual TLS between client, router and runner, by the settings alone."""

from pathlib import Path

import grpc
import pytest
from certificates import Authority
from router_box import Box
from scripted_runner import expected_ids

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
