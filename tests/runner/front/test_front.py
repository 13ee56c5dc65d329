"""Sessions over a real gRPC server, with an engine that the test plays over a real channel."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from google.rpc import code_pb2

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.channel import AsyncChannel, socket_pair
from granatum.runner.front.front import Front, RunnerService
from granatum.runner.records import (
    Cancel,
    Command,
    Departure,
    EngineFigures,
    Failure,
    Finish,
    Ready,
    Report,
    SequenceNews,
    SetDraining,
    StepReport,
    Submit,
    TokenLogprobs,
)
from granatum.runner.text.tokenizer import Tokenizer
from granatum.service.server import build_server, listen
from granatum.v1 import inference_pb2, runner_pb2
from granatum.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    LogprobOptions,
    SamplingParams,
    StopConditions,
    TokenIds,
)
from granatum.v1.runner_pb2 import (
    CancelSequence,
    Ping,
    SequenceOutput,
    SessionRequest,
    SessionResponse,
    SubmitSequence,
)
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return Tokenizer(directory)


@asynccontextmanager
async def started(tokenizer: Tokenizer) -> AsyncIterator[Runner]:
    ours, theirs = socket_pair()
    front = Front(await AsyncChannel.open(ours), tokenizer, vocabulary=259)
    server = build_server(["granatum.v1.RunnerService"])
    add_RunnerServiceServicer_to_server(RunnerService(front, KEY), server)
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


@pytest.fixture
async def runner(tokenizer: Tokenizer) -> AsyncIterator[Runner]:
    async with started(tokenizer) as runner:
        runner.engine.send(READY)
        await runner.front.loaded.wait()
        yield runner


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


async def test_prompt_goes_to_the_engine_and_tokens_come_back(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(
        submission(
            7,
            asks(
                "hi",
                sampling=SamplingParams(temperature=0.5, seed=2**64 - 1),
                stop=StopConditions(token_ids=[5], min_tokens=2),
                logprobs=LogprobOptions(top=3),
                priority=-1,
            ),
            adapter_digest="sha256:" + "ab" * 32,
        )
    )
    submit = await runner.submitted()
    assert submit.prompt == (BOS, *b"hi")
    assert submit.adapter == "ab" * 32
    assert (submit.sampling.temperature, submit.sampling.seed) == (0.5, 2**64 - 1)
    assert submit.stop_ids == {5, 258}
    assert (submit.max_tokens, submit.min_tokens) == (256 - 3, 2)
    assert (submit.top_logprobs, submit.priority) == (3, -1)
    runner.report(SequenceNews(submit.sequence_id, tuple(b"a")))
    (first,) = await outputs(stream)
    assert (first.sequence_id, first.prompt_tokens, first.tokens[0].text) == (7, 3, "a")
    runner.report(SequenceNews(submit.sequence_id, (258,), outcome=Finish.STOP))
    (last,) = await outputs(stream)
    assert (last.tokens[0].id, last.tokens[0].text, last.prompt_tokens) == (258, "", 0)
    assert last.finished == inference_pb2.FINISH_REASON_STOP


async def test_adapters_on_the_device_are_as_last_told(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks()))
    submit = await runner.submitted()
    runner.report(resident=("a", "b"))
    runner.report(SequenceNews(submit.sequence_id, (65,)))
    await outputs(stream)
    assert runner.front.resident == ("a", "b")


async def test_one_message_carries_a_step_of_all_of_a_router(runner: Runner) -> None:
    one, other = runner.session(), runner.session()
    ids = []
    for stream, number in ((one, 1), (one, 2), (other, 1)):
        await stream.write(submission(number, asks()))
        ids.append((await runner.submitted()).sequence_id)
    runner.report(*(SequenceNews(engine_id, (65,)) for engine_id in ids))
    assert [output.sequence_id for output in await outputs(one)] == [1, 2]
    assert [output.sequence_id for output in await outputs(other)] == [1]


async def test_news_merge_while_a_write_is_in_flight(tokenizer: Tokenizer) -> None:
    """Played without a server: what is taken between two responses comes as one."""
    async with started(tokenizer) as runner:
        runner.engine.send(READY)
        await runner.front.loaded.wait()
        session = runner.front.open()
        commands: asyncio.Queue[SessionRequest] = asyncio.Queue()

        async def feed() -> AsyncIterator[SessionRequest]:
            while True:
                yield await commands.get()

        follow = asyncio.create_task(session.follow(feed()))
        commands.put_nowait(submission(1, asks()))
        engine_id = (await runner.submitted()).sequence_id
        responses = session.responses()
        session.take(SequenceNews(engine_id, tuple(b"a")))
        first = await anext(responses)
        for byte in b"bc":
            session.take(SequenceNews(engine_id, (byte,)))
        session.take(SequenceNews(engine_id, tuple(b"d"), outcome=Finish.LENGTH))
        second = await anext(responses)
        follow.cancel()
        assert [t.text for t in first.outputs[0].tokens] == ["a"]
        assert [t.text for t in second.outputs[0].tokens] == ["b", "c", "d"]
        assert second.outputs[0].finished == inference_pb2.FINISH_REASON_LENGTH


async def test_stop_string_ends_the_stream_and_frees_the_engine(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks(stop=StopConditions(strings=["END"]))))
    engine_id = (await runner.submitted()).sequence_id
    runner.report(SequenceNews(engine_id, tuple(b"aEN")))
    (first,) = await outputs(stream)
    assert "".join(token.text for token in first.tokens) == "a"
    runner.report(SequenceNews(engine_id, tuple(b"D")))
    (last,) = await outputs(stream)
    assert last.finished == inference_pb2.FINISH_REASON_STOP
    assert [(token.id, token.text) for token in last.tokens] == [(ord("D"), "")]
    assert await runner.cancelled() == engine_id


async def test_resumed_stream_goes_on_with_its_half_stop_string(runner: Runner) -> None:
    stream = runner.session()
    request = asks(stop=StopConditions(strings=["END"], max_tokens=9))
    await stream.write(submission(1, request, generated=list(b"aEN"), text_delivered=1))
    submit = await runner.submitted()
    assert (submit.generated, submit.max_tokens) == (tuple(b"aEN"), 9)
    runner.report(SequenceNews(submit.sequence_id, tuple(b"x")))
    (output,) = await outputs(stream)
    assert [token.text for token in output.tokens] == ["ENx"]


async def test_departures_and_failures_are_told(runner: Runner) -> None:
    stream = runner.session()
    outcomes: list[Departure | Failure] = [
        Departure.REFUSED,
        Departure.EVICTED,
        Departure.DRAINED,
        Failure(14, "away", "GONE"),
    ]
    for number, outcome in enumerate(outcomes):
        await stream.write(submission(number, asks()))
        runner.report(SequenceNews((await runner.submitted()).sequence_id, outcome=outcome))
        (output,) = await outputs(stream)
        assert output.prompt_tokens == 3
        if isinstance(outcome, Failure):
            failed = output.failed
            assert (failed.code, failed.message, failed.reason) == (14, "away", "GONE")
        else:
            expected = f"DEPARTURE_{outcome.name}"
            assert runner_pb2.Departure.Name(output.departed) == expected


async def test_cancellation_reaches_the_engine(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks()))
    engine_id = (await runner.submitted()).sequence_id
    await stream.write(SessionRequest(cancel=CancelSequence(sequence_id=1)))
    assert await runner.cancelled() == engine_id


@pytest.mark.parametrize("end", ["cancel", "half close"])
async def test_sequences_of_a_broken_session_are_cancelled(runner: Runner, end: str) -> None:
    stream = runner.session()
    ids = set()
    for number in range(3):
        await stream.write(submission(number, asks()))
        ids.add((await runner.submitted()).sequence_id)
    if end == "cancel":
        stream.cancel()
    else:
        await stream.done_writing()
    assert {await runner.cancelled() for _ in ids} == ids


def bad_requests() -> dict[str, tuple[GenerateRequest, str]]:
    penalty = SamplingParams(presence_penalty=3)
    return {
        "no input": (GenerateRequest(), "prompt"),
        "no tokens": (GenerateRequest(token_ids=TokenIds()), "token_ids.ids"),
        "too long": (asks("x" * 300), "301 tokens"),
        "exactly too long": (asks("x" * 255), "at most 255"),
        "token id": (GenerateRequest(token_ids=TokenIds(ids=[1, 259])), "259"),
        "top_p": (asks(sampling=SamplingParams(top_p=0)), "sampling.top_p"),
        "temperature": (asks(sampling=SamplingParams(temperature=float("nan"))), "temperature"),
        "min_p": (asks(sampling=SamplingParams(min_p=1.5)), "sampling.min_p"),
        "penalty": (asks(sampling=penalty), "presence_penalty"),
        "repetition": (asks(sampling=SamplingParams(repetition_penalty=0)), "repetition"),
        "max_tokens": (asks(stop=StopConditions(max_tokens=0)), "stop.max_tokens"),
        "min_tokens": (asks(stop=StopConditions(max_tokens=2, min_tokens=3)), "min_tokens"),
        "stop string": (asks(stop=StopConditions(strings=[""])), "stop.strings"),
        "logprobs": (asks(logprobs=LogprobOptions(top=21)), "logprobs.top"),
        "chat": (GenerateRequest(chat=Chat()), "chat.messages"),
    }


@pytest.mark.parametrize("name", bad_requests())
async def test_bad_requests_name_their_field(runner: Runner, name: str) -> None:
    request, message = bad_requests()[name]
    stream = runner.session()
    await stream.write(submission(1, request))
    (output,) = await outputs(stream)
    assert output.failed.code == code_pb2.INVALID_ARGUMENT
    assert message in output.failed.message


async def test_chat_goes_through_the_models_template(runner: Runner) -> None:
    stream = runner.session()
    chat = Chat(messages=[ChatMessage(role="user", content="yo")])
    await stream.write(
        submission(1, GenerateRequest(chat=chat, stop=StopConditions(ignore_eos=True)))
    )
    submit = await runner.submitted()
    assert submit.prompt == (BOS, *b"yo>")
    assert submit.stop_ids == frozenset()


BULKY = StopConditions(strings=["y" * 256] * 16)
"""Makes a submission so large that it is prepared in a thread."""


def slow_encoding(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Prompts of more than a few tokens wait for the event."""
    release, real = threading.Event(), Tokenizer.encode

    def slow(tokenizer: Tokenizer, text: str, most: int | None = None) -> list[int]:
        assert len(text) < 9 or release.wait(10)
        return real(tokenizer, text, most)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    return release


async def test_long_prompt_does_not_hold_up_a_short_one(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one is prepared in a thread; the short one overtakes it."""
    release = slow_encoding(monkeypatch)
    stream = runner.session()
    await stream.write(submission(1, asks("x" * 200, stop=BULKY)))
    await stream.write(submission(2, asks("s")))
    assert (await runner.submitted()).prompt == (BOS, *b"s")
    release.set()
    assert len((await runner.submitted()).prompt) == 201


async def test_cancelled_while_it_is_prepared_never_reaches_the_engine(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = slow_encoding(monkeypatch)
    stream = runner.session()
    await stream.write(submission(1, asks("x" * 200, stop=BULKY)))
    await stream.write(SessionRequest(cancel=CancelSequence(sequence_id=1)))
    await stream.write(submission(2, asks("s")))
    assert (await runner.submitted()).prompt == (BOS, *b"s")
    release.set()
    await stream.write(submission(3, asks("t")))
    assert (await runner.submitted()).prompt == (BOS, *b"t")


@pytest.mark.parametrize("key", ["", "wrong"])
async def test_only_the_cluster_key_opens_a_session(runner: Runner, key: str) -> None:
    stream = runner.session(key)
    assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_loading_runner_says_so(tokenizer: Tokenizer) -> None:
    async with started(tokenizer) as runner:
        stream = runner.session()
        assert await stream.code() == grpc.StatusCode.UNAVAILABLE
        assert "loading" in (await stream.details() or "")


async def test_streams_outlive_the_engine_that_dies(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks()))
    await runner.submitted()
    runner.engine.close()
    await until(lambda: runner.relay.done())
    runner.front.lose(lambda _: Departure.ENGINE_LOST)
    (output,) = await outputs(stream)
    assert output.departed == runner_pb2.DEPARTURE_ENGINE_LOST
    await stream.write(submission(2, asks()))
    (output,) = await outputs(stream)
    assert output.departed == runner_pb2.DEPARTURE_REFUSED


async def test_router_that_falls_silent_loses_its_session(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sequences are cancelled, and it reads that the session is over."""
    monkeypatch.setattr("granatum.runner.front.session.LIFE_S", 0.04)
    monkeypatch.setattr("granatum.runner.front.session.SILENT_S", 0.5)
    stream = runner.session()
    await stream.write(submission(1, asks()))
    engine_id = (await runner.submitted()).sequence_id
    assert await runner.cancelled() == engine_id
    async with asyncio.timeout(5):
        while (response := await stream.read()) is not grpc.aio.EOF:
            assert isinstance(response, SessionResponse)
            assert not response.outputs, "a sign of life"


async def test_router_that_does_not_read_loses_its_session(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pings keep coming; what it is told does not get through."""
    monkeypatch.setattr("granatum.runner.front.session.LIFE_S", 0.04)
    monkeypatch.setattr("granatum.runner.front.session.STUCK_S", 0.3)
    stream = runner.session()
    await stream.write(submission(1, asks(logprobs=LogprobOptions(top=20))))
    engine_id = (await runner.submitted()).sequence_id
    entry = TokenLogprobs(-0.5, tuple((65 + i, -0.5) for i in range(20)))
    cancelled = asyncio.create_task(runner.engine.receive())
    async with asyncio.timeout(30):
        while not cancelled.done():
            runner.report(SequenceNews(engine_id, (65,) * 300, (entry,) * 300))
            await stream.write(SessionRequest(ping=Ping()))
            await asyncio.sleep(0.01)
    assert await cancelled == Cancel(engine_id)
    await until(lambda: not runner.front._open)


async def test_drain_gives_everything_back_before_sessions_end(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks()))
    engine_id = (await runner.submitted()).sequence_id
    draining = asyncio.create_task(runner.front.drain(5))
    assert await asyncio.wait_for(runner.engine.receive(), 5) == SetDraining(True)
    runner.report(SequenceNews(engine_id, outcome=Departure.DRAINED))
    (output,) = await outputs(stream)
    assert output.departed == runner_pb2.DEPARTURE_DRAINED
    await draining
    assert await asyncio.wait_for(stream.read(), 5) is grpc.aio.EOF
