"""Routers in this process and scripted runners beside them, over real gRPC and a real Valkey."""

import asyncio
import itertools
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
from scripted_runner import ScriptedRunner, expected_ids, text_of

from granatum.models.base_model import BaseModel
from granatum.router.app import RouterApp
from granatum.router.services import keys_file
from granatum.router.services.keys_file import Identity
from granatum.router.settings import RouterSettings
from granatum.v1.adapters_pb2_grpc import AdapterServiceStub
from granatum.v1.cluster_pb2 import ListRunnersRequest, RunnerStatus
from granatum.v1.cluster_pb2_grpc import ClusterServiceStub
from granatum.v1.errors import GranatumError
from granatum.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    GenerateRequest,
    GenerateResponse,
    StopConditions,
)
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer

if TYPE_CHECKING:
    from granatum.v1.adapters_pb2_grpc import AdapterServiceAsyncStub
    from granatum.v1.cluster_pb2_grpc import ClusterServiceAsyncStub
    from granatum.v1.inference_pb2_grpc import InferenceServiceAsyncStub

CLUSTER_KEY = "the cluster key of the tests"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70_000,
}


@dataclass
class Answer:
    """A stream's messages."""

    responses: list[GenerateResponse]

    @property
    def ids(self) -> list[int]:
        return [token.id for response in self.responses for token in response.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for response in self.responses for token in response.tokens)

    @property
    def resumptions(self) -> int:
        return self.responses[-1].end.timings.resumptions


@dataclass
class Box:
    """One fleet: open routers and runners as a test needs them; leaving closes them all."""

    folder: Path
    redis_url: str
    config: dict[str, Any]
    routers: list[RouterApp] = field(default_factory=list)
    runners: dict[str, ScriptedRunner] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        (self.folder / "config.json").write_text(json.dumps(self.config))
        self.fingerprint = BaseModel.from_config(self.folder).fingerprint
        self.keys = self.folder / "keys.json"
        self.admin = keys_file.add(self.keys, Identity(None))
        self.acme = self.tenant("acme")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def tenant(self, name: str) -> str:
        return keys_file.add(self.keys, Identity(name))

    def settings(self, **changes: Any) -> RouterSettings:
        usual: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "redis": self.redis_url,
            "store": (self.folder / "store").as_uri(),
            "model-config": self.folder,
            "keys": self.keys,
            "cluster-key": CLUSTER_KEY,
            "heartbeat_s": 0.25,
            "lease_s": 1.5,
            "grace_s": 0.0,
            "patience_s": 10.0,
        }
        return RouterSettings(**(usual | changes))

    async def router(self, **changes: Any) -> RouterApp:
        router = await self._stack.enter_async_context(RouterApp(self.settings(**changes)))
        self.routers.append(router)
        return router

    async def runner(self, id_: str, **fields: Any) -> ScriptedRunner:
        runner = ScriptedRunner(
            id=id_,
            fingerprint=self.fingerprint,
            cluster_key=CLUSTER_KEY,
            routers=[f"127.0.0.1:{router.port}" for router in self.routers],
            **fields,
        )
        self.runners[id_] = await self._stack.enter_async_context(runner)
        return runner

    def channel(self, router: int = 0) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.routers[router].port}")
        self._stack.push_async_callback(channel.close)
        return channel

    def inference(self, router: int = 0) -> "InferenceServiceAsyncStub":
        return InferenceServiceStub(self.channel(router))

    def adapters(self, router: int = 0) -> "AdapterServiceAsyncStub":
        return AdapterServiceStub(self.channel(router))

    def cluster(self, router: int = 0) -> "ClusterServiceAsyncStub":
        return ClusterServiceStub(self.channel(router))

    async def generate(
        self, prompt: str, tokens: int = 20, router: int = 0, seconds: float = 20
    ) -> Answer:
        request = GenerateRequest(prompt=prompt, stop=StopConditions(max_tokens=tokens))
        call = self.inference(router).Generate(request, metadata=bearer(self.acme), timeout=seconds)
        return Answer([response async for response in call])

    async def error_of(self, prompt: str, seconds: float = 20) -> GranatumError:
        """How a stream ends that must not go well."""
        try:
            await self.generate(prompt, seconds=seconds)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        raise AssertionError(f"{prompt!r} was answered")

    async def generate_many(self, number: int, tokens: int = 20) -> dict[str, Answer]:
        """So many streams at once, over all routers in turn."""
        stubs = [self.inference(i) for i in range(len(self.routers))]
        turn = itertools.cycle(stubs)

        async def one(prompt: str) -> Answer:
            request = GenerateRequest(prompt=prompt, stop=StopConditions(max_tokens=tokens))
            call = next(turn).Generate(request, metadata=bearer(self.acme), timeout=30)
            return Answer([response async for response in call])

        prompts = [f"prompt {n}" for n in range(number)]
        answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return dict(zip(prompts, answers, strict=True))

    async def statuses(self, router: int = 0) -> dict[str, RunnerStatus]:
        listed = await self.cluster(router).ListRunners(
            ListRunnersRequest(), metadata=bearer(self.admin), timeout=5
        )
        return {status.runner.id: status for status in listed.runners}

    async def idle(self) -> None:
        """Wait until nothing is reserved and nothing runs."""
        async with asyncio.timeout(10):
            while any(s.reserved for s in (await self.statuses()).values()) or any(
                runner.active for runner in self.runners.values()
            ):
                await asyncio.sleep(0.01)


def whole(box: Box, answers: dict[str, Answer], tokens: int) -> None:
    """Every stream has its very tokens and text, and no runner was given wrong ones."""
    for prompt, answer in answers.items():
        ids = expected_ids(prompt, tokens)
        assert answer.ids == ids
        assert answer.text == text_of(ids)
        assert answer.responses[-1].end.reason == FINISH_REASON_LENGTH
        assert answer.responses[-1].end.usage.completion_tokens == tokens
        assert answer.responses[-1].end.usage.prompt_tokens == len(prompt)
        assert sum(response.HasField("start") for response in answer.responses) == 1
        assert answer.responses[0].HasField("start")
    assert [wrong for runner in box.runners.values() for wrong in runner.wrong] == []
