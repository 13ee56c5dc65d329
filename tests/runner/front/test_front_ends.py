"""How sessions begin, wait and end, over a real gRPC server."""

import asyncio
import threading

import grpc
import pytest
from front_rig import BOS, Runner, asks, outputs, started, submission, until

from granatum.runner.records import Cancel, Departure, SequenceNews, SetDraining, TokenLogprobs
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1 import runner_pb2
from granatum.v1.inference_pb2 import LogprobOptions, StopConditions
from granatum.v1.runner_pb2 import CancelSequence, Ping, SessionRequest, SessionResponse

BULKY = StopConditions(strings=["y" * 256] * 16)
"""Makes a submission so large that it is prepared in a thread."""


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
