"""The runner's service with the real engine on the example model, its adapters in a real store."""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Thread

import grpc
import pytest

from granatum.adapters_store.blobs.incoming import FileDeclaration, UploadHeader
from granatum.adapters_store.store import AdapterStore
from granatum.examples.tasks import ADAPTER_TASKS, BASE, BASE_MODEL, Task, held_out_words
from granatum.models.base_model import BaseModel
from granatum.models.config import read_config
from granatum.runner.adapters.disk.source import AdapterSource
from granatum.runner.channel import AsyncChannel, Channel, ChannelClosed, socket_pair
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.process import EngineOptions, build_engine, serve
from granatum.runner.front.front import Front
from granatum.runner.front.servicer import RunnerServicer
from granatum.runner.records import Command, Report
from granatum.runner.text.tokenizer import Tokenizer
from granatum.service.server import build_server, listen
from granatum.v1 import inference_pb2, runner_pb2
from granatum.v1.errors import Code
from granatum.v1.inference_pb2 import GenerateRequest, LogprobOptions, StopConditions
from granatum.v1.runner_pb2 import Ping, SequenceOutput, SessionRequest, SubmitSequence
from granatum.v1.runner_pb2_grpc import RunnerServiceStub, add_RunnerServiceServicer_to_server
from granatum.v1.transport import bearer, open_channel

KEY = "cluster-key"
FILES = ("adapter_config.json", "adapter_model.safetensors")


async def upload(store: AdapterStore, task: Task) -> str:
    """The adapter's digest."""
    data = [(task.path / name).read_bytes() for name in FILES]
    files = [
        FileDeclaration(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in zip(FILES, data, strict=True)
    ]

    async def chunks() -> AsyncIterator[bytes]:
        for content in data:
            yield content

    manifest, _ = await store.upload(task.tenant, UploadHeader(task.name, tuple(files)), chunks())
    return manifest.digest.removeprefix("sha256:")


class Session:
    """A router's session; `run` gives a request's output, whole."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.commands: asyncio.Queue[SessionRequest] = asyncio.Queue()
        self.stream = RunnerServiceStub(channel).Session(self.write(), metadata=bearer(KEY))
        self.outputs: dict[int, SequenceOutput] = {}
        self.over: dict[int, asyncio.Event] = {}

    async def write(self) -> AsyncIterator[SessionRequest]:
        while True:
            try:
                yield await asyncio.wait_for(self.commands.get(), 1)
            except TimeoutError:
                yield SessionRequest(ping=Ping())

    async def read(self) -> None:
        async for response in self.stream:
            for output in response.outputs:
                self.outputs[output.sequence_id].MergeFrom(output)
                if output.WhichOneof("outcome"):
                    self.over[output.sequence_id].set()

    async def run(
        self, request: GenerateRequest, digest: str = "", **more: object
    ) -> SequenceOutput:
        number = len(self.outputs) + 1
        self.outputs[number], self.over[number] = SequenceOutput(), asyncio.Event()
        submit = SubmitSequence(
            sequence_id=number,
            request=request,
            adapter_digest=digest and f"sha256:{digest}",
            **more,  # type: ignore[arg-type]
        )
        self.commands.put_nowait(SessionRequest(submit=submit))
        await asyncio.wait_for(self.over[number].wait(), 60)
        return self.outputs[number]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store with the example adapters, and their digests by name."""
    root = tmp_path_factory.mktemp("store")
    store = AdapterStore.open(root.as_uri(), BaseModel.from_config(BASE_MODEL))

    async def fill() -> dict[str, str]:
        return {task.name: await upload(store, task) for task in ADAPTER_TASKS}

    return root, asyncio.run(fill())


@pytest.fixture(scope="module")
def engine(
    adapters: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    options = EngineOptions(
        BASE_MODEL, device="cpu", max_batch=12, host_cache_bytes=32 << 20, arena_bytes=48 << 20
    )
    source = AdapterSource(adapters[0].as_uri(), tmp_path_factory.mktemp("cache"), 1 << 30)
    return build_engine(options, source)


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[str]:
    """The engine in a thread, the front on our loop; the address."""
    ours, theirs = socket_pair()
    channel: Channel[Report, Command] = Channel(theirs)

    def loop() -> None:
        with suppress(ChannelClosed):
            serve(engine, channel)

    thread = Thread(target=loop)
    thread.start()
    front = Front(
        await AsyncChannel.open(ours), Tokenizer(BASE_MODEL), read_config(BASE_MODEL).vocab
    )
    relay = asyncio.create_task(front.run())
    server = build_server(["granatum.v1.RunnerService"])
    add_RunnerServiceServicer_to_server(RunnerServicer(front, KEY), server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    await front.loaded.wait()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        front.stop()
        await asyncio.to_thread(thread.join)
        channel.close()
        await asyncio.gather(relay, return_exceptions=True)
        await server.stop(None)


@pytest.fixture
async def session(engine: Engine) -> AsyncIterator[Session]:
    async with serving(engine) as address, open_channel(address) as channel:
        session = Session(channel)
        reader = asyncio.create_task(session.read())
        yield session
        session.stream.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def text(output: SequenceOutput) -> str:
    return "".join(token.text for token in output.tokens)


def asks(prompt: str, *strings: str, **more: object) -> GenerateRequest:
    stop = StopConditions(strings=strings, max_tokens=120)
    return GenerateRequest(prompt=prompt, stop=stop, **more)  # type: ignore[arg-type]


async def test_every_adapter_does_its_task_in_one_batch(
    session: Session, adapters: tuple[Path, dict[str, str]]
) -> None:
    tasks = (BASE, *ADAPTER_TASKS)
    words = held_out_words(2)
    runs = [
        session.run(asks(task.prompt(word), task.stop), adapters[1].get(task.name, ""))
        for task in tasks
        for word in words
    ]
    outputs = await asyncio.gather(*runs)
    expected = [task.expected(word) for task in tasks for word in words]
    right = sum(text(o) == e for o, e in zip(outputs, expected, strict=True))
    assert right >= len(expected) - 1, [text(output) for output in outputs]
    for output in outputs:
        assert output.finished == inference_pb2.FINISH_REASON_STOP
        assert output.prompt_tokens


async def test_stream_resumed_with_its_tokens_goes_on_as_it_would_have(
    session: Session, adapters: tuple[Path, dict[str, str]]
) -> None:
    digest = adapters[1]["chant"]
    request = asks("granite>", "\n")
    request.sampling.temperature = 0.7
    request.sampling.seed = 11
    whole = await session.run(request, digest)
    cut = len(whole.tokens) // 2
    head = whole.tokens[:cut]
    rest = await session.run(
        request,
        digest,
        generated=[token.id for token in head],
        text_delivered=sum(len(token.text) for token in head),
    )
    assert [t.id for t in (*head, *rest.tokens)] == [t.id for t in whole.tokens]
    assert "".join(t.text for t in (*head, *rest.tokens)) == text(whole)


@pytest.mark.parametrize(("string", "expected"), [("</s>", "granite\n"), ("\n</s>", "granite")])
async def test_stop_string_of_special_tokens_ends_the_stream(
    session: Session, string: str, expected: str
) -> None:
    stop = StopConditions(strings=[string], ignore_eos=True, max_tokens=40)
    request = GenerateRequest(prompt="granite>", stop=stop, logprobs=LogprobOptions(top=1))
    output = await session.run(request)
    assert (text(output), output.finished) == (expected, inference_pb2.FINISH_REASON_STOP)
    assert bytes(token.id for token in output.tokens[:-1]) == b"granite\n"
    assert output.tokens[-1].logprob.top[0].text == "</s>"


ENDS = ["stop string", "special stop string", "stop token", "end of text", "length"]


@pytest.mark.parametrize("end", ENDS)
async def test_stream_resumed_after_its_last_token_ends_as_it_did(
    session: Session, end: str
) -> None:
    stops = {
        "stop string": StopConditions(strings=["\n"]),
        "special stop string": StopConditions(strings=["</s>"], ignore_eos=True),
        "stop token": StopConditions(token_ids=[ord("n")]),
        "end of text": StopConditions(),
        "length": StopConditions(max_tokens=3),
    }
    request = GenerateRequest(prompt="granite>", stop=stops[end])
    whole = await session.run(request)
    again = await session.run(
        request,
        generated=[token.id for token in whole.tokens],
        text_delivered=len(text(whole)),
    )
    assert (again.tokens, again.finished) == ([], whole.finished)
    assert again.prompt_tokens == whole.prompt_tokens
    assert (whole.finished == inference_pb2.FINISH_REASON_LENGTH) == (end == "length")


async def test_log_probabilities_come_with_their_texts(session: Session) -> None:
    output = await session.run(asks("granite>", "\n", logprobs=LogprobOptions(top=2)))
    for token in output.tokens:
        assert len(token.logprob.top) == 2
        assert token.logprob.value == pytest.approx(token.logprob.top[0].value)
        assert token.logprob.top[0].id == token.id
    assert output.tokens[0].logprob.top[0].text == "g"


async def test_adapter_that_the_store_lacks_leaves_alone(session: Session) -> None:
    missing, base = await asyncio.gather(
        session.run(asks("granite>", "\n"), "0" * 64), session.run(asks("granite>", "\n"))
    )
    assert missing.departed == runner_pb2.DEPARTURE_LOAD_FAILED
    assert missing.cause.code == Code.NOT_FOUND
    assert missing.prompt_tokens
    assert text(base) == "granite"


async def test_adapters_on_disk_outlast_the_store(
    session: Session, adapters: tuple[Path, dict[str, str]]
) -> None:
    root, digests = adapters
    first = await session.run(asks("granite>", "\n"), digests["shout"])
    moved = root.with_name("away")
    shutil.move(root, moved)
    try:
        again = await session.run(asks("granite>", "\n"), digests["shout"])
    finally:
        shutil.move(moved, root)
    assert text(first) == text(again) == "GRANITE"


async def test_stream_ends_at_max_tokens(session: Session) -> None:
    request = GenerateRequest(prompt="granite>", stop=StopConditions(max_tokens=3))
    output = await session.run(request)
    assert (text(output), output.finished) == ("gra", inference_pb2.FINISH_REASON_LENGTH)
