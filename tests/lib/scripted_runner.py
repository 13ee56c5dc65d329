"""A runner without a model: a real gRPC server whose tokens are a function of prompt and position.

It follows a script (refuse, evict, drain, stall, die), and checks that a resumed sequence comes
with exactly the tokens it should have.
"""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from granatum.service.server import build_server, listen
from granatum.v1.cluster_pb2 import DeregisterRequest, HeartbeatRequest, HeartbeatResponse, Runner
from granatum.v1.cluster_pb2_grpc import RegistryServiceStub
from granatum.v1.errors import Unauthenticated
from granatum.v1.inference_pb2 import FINISH_REASON_LENGTH, GenerateRequest, Token
from granatum.v1.runner_pb2 import (
    DEPARTURE_DRAINED,
    DEPARTURE_EVICTED,
    DEPARTURE_REFUSED,
    Departure,
    SequenceFailure,
    SequenceOutput,
    SessionRequest,
    SessionResponse,
    SubmitSequence,
)
from granatum.v1.runner_pb2_grpc import RunnerServiceServicer, add_RunnerServiceServicer_to_server
from granatum.v1.transport import Tls, bearer, bearer_of, open_channel

_SIGN_OF_LIFE_S = 0.05
_CHATS = itertools.count()
PIECES = (" a", "é", "日本", "", "🌰x", "\n", "longer piece")


def token_id(prompt: str, position: int) -> int:
    """The token that any runner makes there."""
    digest = hashlib.sha256(f"{prompt}|{position}".encode()).digest()
    return int.from_bytes(digest[:2], "big")


def expected_ids(prompt: str, number: int) -> list[int]:
    return [token_id(prompt, i) for i in range(number)]


def logprob_of(id_: int, adapter: bool) -> float:
    """The log probability that any runner computes for a given token."""
    return -(id_ % 7) / 4 - (1.0 if adapter else 3.0)


def prompt_of(request: GenerateRequest) -> str:
    """The prompt; its tokens are bytes. A chat's is another one each time that it is asked for."""
    if request.HasField("chat"):
        return f"chat {next(_CHATS)}"
    return bytes(request.token_ids.ids).decode() or request.prompt


def text_of(ids: list[int]) -> str:
    return "".join(PIECES[i % len(PIECES)] for i in ids)


@dataclass
class Active:
    """A sequence in the runner."""

    submission: SubmitSequence
    ids: list[int]
    delivered: int
    off: float = 0.0
    """Added to the log probabilities under an adapter."""
    made_here: int = 0

    def __post_init__(self) -> None:
        self.text = text_of(self.ids)
        self.prompt = prompt_of(self.submission.request)

    @property
    def complete(self) -> bool:
        return len(self.ids) >= self.submission.request.stop.max_tokens

    def step(self) -> SequenceOutput:
        """One token; every third holds its text back for the next."""
        forced = self.submission.forced
        place = len(self.ids)
        self.ids.append(forced[place] if forced else token_id(self.prompt, place))
        self.made_here += 1
        self.text += text_of(self.ids[-1:])
        hold = len(self.ids) % 3 == 1 and not self.complete
        upto = self.delivered if hold else len(self.text)
        token = Token(id=self.ids[-1], text=self.text[self.delivered : upto])
        if self.submission.request.HasField("logprobs"):
            adapter = bool(self.submission.adapter_digest)
            token.logprob.value = logprob_of(token.id, adapter) + self.off * adapter
        self.delivered = max(self.delivered, upto)
        output = SequenceOutput(sequence_id=self.submission.sequence_id, tokens=[token])
        if self.made_here == 1:
            output.prompt_tokens = len(self.prompt.encode())
            if not self.submission.request.HasField("token_ids"):
                output.prompt.ids.extend(self.prompt.encode())
        if self.complete:
            output.finished = FINISH_REASON_LENGTH
        return output


@dataclass
class Script:
    """What goes wrong."""

    refuse: int = 0
    """So many submissions are refused, at first."""
    evict_after: int = 0
    """Each sequence is evicted after so many tokens made here."""
    stalled: bool = False
    """No step is made."""
    silent: bool = False
    """No heartbeat is sent."""
    fail: SequenceFailure | None = None
    """Every submission fails so."""
    depart: "Departure.ValueType | None" = None
    """Every submission comes back so, with `fail` as its cause."""
    mute: bool = False
    """Sessions hear no word, not even a sign of life."""
    step_s: float = 0.001
    off: float = 0.0
    """The log probabilities under adapters are off by this much."""
    outdated: bool = False
    """Given tokens are not heeded."""
    burst: int = 1
    """So many steps come up in one message."""


@dataclass
class ScriptedRunner(RunnerServiceServicer):
    """A runner on a loopback port, known to the routers at `routers`."""

    id: str
    fingerprint: str
    cluster_key: str
    routers: list[str]
    max_batch: int = 64
    script: Script = field(default_factory=Script)
    draining: bool = False
    tls: Tls | None = None
    """To serve with, and to show to routers."""
    address: str = ""
    submissions: list[SubmitSequence] = field(default_factory=list)
    cancelled: int = 0
    pings: int = 0
    peak: int = 0
    wrong: list[str] = field(default_factory=list)
    active: dict[tuple[int, int], Active] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self._server = build_server([])
        add_RunnerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{listen(self._server, '127.0.0.1:0', self.tls)}"
        await self._server.start()
        self._channels = [open_channel(router, self.tls) for router in self.routers]
        await self.heartbeat()
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Stop at once, without a word to anyone."""
        self._beating.cancel()
        for channel in self._channels:
            await channel.close()
        await self._server.stop(None)

    def record(self) -> Runner:
        return Runner(
            id=self.id,
            address=self.address,
            model="scripted",
            model_fingerprint=self.fingerprint,
            max_batch=self.max_batch,
            total_pages=10_000,
            free_pages=10_000,
            page_tokens=16,
            max_context=4096,
            sequences=len(self.active),
            draining=self.draining,
        )

    async def heartbeat(self) -> HeartbeatResponse:
        """Tell every router that answers."""
        answer = HeartbeatResponse(interval_s=0.2)
        for channel in self._channels:
            stub = RegistryServiceStub(channel)
            with suppress(grpc.aio.AioRpcError):
                answer = await stub.Heartbeat(
                    HeartbeatRequest(runner=self.record()),
                    metadata=bearer(self.cluster_key),
                    timeout=5,
                )
        return answer

    async def deregister(self) -> None:
        stub = RegistryServiceStub(self._channels[0])
        request = DeregisterRequest(runner_id=self.id)
        await stub.Deregister(request, metadata=bearer(self.cluster_key))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if not self.script.silent:
                self.draining = (await self.heartbeat()).drain

    async def Session(  # noqa: N802
        self, requests: AsyncIterator[SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[SessionResponse]:
        if bearer_of(context.invocation_metadata()) != self.cluster_key:
            raise Unauthenticated("not the cluster key")
        session = id(context)
        immediate: list[SequenceOutput] = []
        reading = asyncio.create_task(self._read(requests, session, immediate))
        try:
            spoke = asyncio.get_running_loop().time()
            while not reading.done():
                await asyncio.sleep(self.script.step_s)
                outputs = immediate[:]
                immediate.clear()
                if not self.script.stalled:
                    for _ in range(self.script.burst):
                        outputs += self._step(session)
                now = asyncio.get_running_loop().time()
                if self.script.mute:
                    continue
                if outputs or now > spoke + _SIGN_OF_LIFE_S:
                    spoke = now
                    yield SessionResponse(outputs=outputs)
        finally:
            reading.cancel()
            for key in [key for key in self.active if key[0] == session]:
                del self.active[key]

    async def _read(
        self,
        requests: AsyncIterator[SessionRequest],
        session: int,
        immediate: list[SequenceOutput],
    ) -> None:
        async for request in requests:
            if request.HasField("ping"):
                self.pings += 1
            elif request.HasField("cancel"):
                self.cancelled += 1
                self.active.pop((session, request.cancel.sequence_id), None)
            else:
                output = self._admit(session, request.submit)
                if output is not None:
                    immediate.append(output)

    def _admit(self, session: int, submission: SubmitSequence) -> SequenceOutput | None:
        self.submissions.append(submission)
        if self.script.outdated:
            submission.ClearField("forced")
        ids = list(submission.generated)
        prompt = prompt_of(submission.request)
        if ids != (list(submission.forced[: len(ids)]) or expected_ids(prompt, len(ids))):
            self.wrong.append(f"{prompt}: generated {ids}")
        if ids and not submission.request.HasField("token_ids"):
            self.wrong.append(f"{prompt}: came as text again")
        number = submission.sequence_id
        if self.script.depart is not None:
            return SequenceOutput(
                sequence_id=number, departed=self.script.depart, cause=self.script.fail
            )
        if self.script.fail is not None:
            return SequenceOutput(sequence_id=number, failed=self.script.fail)
        if self.script.refuse or self.draining or len(self.active) >= self.max_batch:
            self.script.refuse = max(0, self.script.refuse - 1)
            return SequenceOutput(sequence_id=number, departed=DEPARTURE_REFUSED)
        self.active[session, number] = Active(
            submission, ids, submission.text_delivered, self.script.off
        )
        self.peak = max(self.peak, len(self.active))
        return None

    def _step(self, session: int) -> list[SequenceOutput]:
        outputs = []
        for key, active in list(self.active.items()):
            if key[0] != session:
                continue
            if self.draining:
                output = SequenceOutput(sequence_id=key[1], departed=DEPARTURE_DRAINED)
            else:
                output = active.step()
                evict = self.script.evict_after
                if not active.complete and evict and active.made_here >= evict:
                    output.departed = DEPARTURE_EVICTED
            outputs.append(output)
            if output.WhichOneof("outcome"):
                del self.active[key]
        return outputs
