"""Two models of one shape on one Redis: two fleets that never see each other."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_box import CLUSTER_KEY, CONFIG, Box
from scripted_runner import ScriptedRunner
from wire_adapters import error_of

from granatum.v1.cluster_pb2 import HeartbeatRequest
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.errors import Overloaded, PreconditionFailed, Unavailable
from granatum.v1.transport import bearer


@pytest.fixture
async def twins(redis_url: str, fleet: str, tmp_path: Path) -> AsyncIterator[tuple[Box, Box]]:
    """Routers of a base model and of its instruct version, which has another tokenizer."""
    config = CONFIG | {"rms_norm_eps": 1 / int(fleet, 16)}
    folders = tmp_path / "base", tmp_path / "instruct"
    for folder in folders:
        folder.mkdir()
        tokenizer = {"chat_template": folder.name}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    async with (
        Box(folders[0], redis_url, config) as base,
        Box(folders[1], redis_url, config) as instruct,
    ):
        for box in (base, instruct):
            await box.router(patience_s=0.5)
        yield base, instruct


async def test_runners_of_one_are_no_runners_of_the_other(twins: tuple[Box, Box]) -> None:
    base, instruct = twins
    await base.runner("a")
    assert set(await base.statuses()) == {"a"}
    assert not await instruct.statuses()
    assert isinstance(await error_of(instruct.generate("hello")), Unavailable | Overloaded)
    await instruct.runner("a")
    for box in twins:
        await box.generate("hello")
        assert len(box.runners["a"].submissions) == 1


async def test_a_runner_of_the_other_is_refused_and_told_what_differs(
    twins: tuple[Box, Box],
) -> None:
    base, instruct = twins
    async with ScriptedRunner("a", base.fingerprint, CLUSTER_KEY, []) as runner:
        request = HeartbeatRequest(runner=runner.record())
    stub = RegistryServiceStub(instruct.channel())
    error = await error_of(stub.Heartbeat(request, metadata=bearer(CLUSTER_KEY), timeout=5))
    assert isinstance(error, PreconditionFailed)
    assert error.reason == "MODEL_MISMATCH"
    assert "of other tokenizer:" in error.message
    assert not await instruct.statuses()
