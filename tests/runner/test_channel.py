"""Both ends of the channel over a real socket pair."""

import asyncio
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from threading import Thread

import pytest

from granatum.runner.channel import AsyncChannel, Channel, ChannelClosed, socket_pair
from granatum.runner.records import Failure, Finish, SequenceNews, TokenLogprobs
from granatum.v1.errors import Code


async def ends() -> tuple[AsyncChannel[object, object], Channel[object, object]]:
    front, engine = socket_pair()
    return await AsyncChannel.open(front), Channel(engine)


async def test_messages_arrive_whole_and_in_order() -> None:
    front, engine = await ends()
    sent = [("a", 1), b"x" * 3_000_000, [None], "z"]
    for message in sent:
        front.send(message)
    received: list[object] = []

    def collect() -> None:
        while len(received) < len(sent):
            received.extend(engine.receive_all(5))

    await asyncio.to_thread(collect)
    assert received == sent
    front.close()


async def test_engine_never_waits_for_a_front_that_does_not_read() -> None:
    front, engine = await ends()
    big = b"y" * 1_000_000
    for number in range(40):
        engine.send((number, big))
    got = []

    def keep_flushing() -> None:
        try:
            while True:
                engine.receive_all(1)
        except ChannelClosed:
            return

    thread = Thread(target=keep_flushing)
    thread.start()
    for _ in range(40):
        got.append(await front.receive())
    front.close()
    await asyncio.to_thread(thread.join)
    assert got == [(number, big) for number in range(40)]


async def test_timeout_returns_nothing() -> None:
    front, engine = await ends()
    assert engine.receive_all(0) == []
    assert engine.receive_all(0.01) == []
    front.close()


async def test_end_of_the_front_is_seen_after_its_last_message() -> None:
    front, engine = await ends()
    front.send("last")
    front.close()
    await asyncio.sleep(0)
    assert engine.receive_all(5) == ["last"]
    with pytest.raises(ChannelClosed):
        engine.receive_all(5)


async def test_end_of_the_engine_is_seen_after_its_last_message() -> None:
    front, engine = await ends()
    engine.send("last")
    engine.close()
    assert await front.receive() == "last"
    with pytest.raises(ChannelClosed):
        await front.receive()


async def test_nothing_is_written_to_an_engine_that_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    front, engine = await ends()
    engine.close()
    with pytest.raises(ChannelClosed):
        await front.receive()
    for number in range(20):
        front.send(number)
    front.close()
    front.send("late")
    assert not caplog.records


def test_torch_stays_out() -> None:
    """The records and the channel are the front's; importing them must be cheap."""
    code = (
        "import sys, granatum.runner.channel, granatum.runner.records, "
        "granatum.runner.adapters.cache, granatum.runner.adapters.images.layout; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_news_arrive_whole() -> None:
    logprobs = (TokenLogprobs(-0.5, ((7, -0.5), (9, -1.0))),)
    cause = Failure(Code.NOT_FOUND, "the store lacks it", "NOT_FOUND", "adapter")
    news = SequenceNews(3, (7,), logprobs, Finish.STOP, cause)
    assert all(getattr(news, field.name) for field in fields(news)), "a field that is not tested"
    for whole in (news, replace(news, cause=None)):
        assert pickle.loads(pickle.dumps(whole)) == whole
