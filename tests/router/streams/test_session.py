"""Sessions to runners: alive, silent, moved to another address, or impossible to open."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from broken_link import BrokenLink
from router_box import CLUSTER_KEY, Box
from scripted_runner import Script, ScriptedRunner, expected_ids

from granatum.router.streams.remote_sequence import RemoteSequence, SessionLost
from granatum.router.streams.session import RunnerSessions
from granatum.v1.errors import Unavailable
from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.runner_pb2 import SubmitSequence
from granatum.v1.transport import open_channel

ENDLESS = 1_000_000


def nothing() -> None:
    pass


def submission(prompt: str = "x", tokens: int = ENDLESS) -> SubmitSequence:
    request = GenerateRequest(prompt=prompt, stop=StopConditions(max_tokens=tokens))
    return SubmitSequence(request=request)


@asynccontextmanager
async def runner(id_: str = "a", **script: float) -> AsyncIterator[ScriptedRunner]:
    """A runner that no router knows."""
    async with ScriptedRunner(id_, "", CLUSTER_KEY, [], script=Script(**script)) as running:  # type: ignore[arg-type]
        yield running


@asynccontextmanager
async def sessions(
    silence_s: float = 30.0, connect: Callable[[str], grpc.aio.Channel] = open_channel
) -> AsyncIterator[RunnerSessions]:
    opened = RunnerSessions(connect, CLUSTER_KEY, silence_s)
    try:
        yield opened
    finally:
        await opened.close()


async def loss(sequence: RemoteSequence) -> SessionLost:
    """How a sequence is lost, within some seconds."""
    async with asyncio.timeout(10):
        while True:
            try:
                await sequence.receive(10)
            except SessionLost as lost:
                return lost


async def whole(sequence: RemoteSequence) -> list[int]:
    ids: list[int] = []
    while True:
        news = await sequence.receive(10)
        ids += [token.id for output in news for token in output.tokens]
        if news[-1].HasField("finished"):
            return ids


async def test_a_silent_runner_is_left_and_nothing_counts_against_its_sequence() -> None:
    async with runner() as there, sessions(silence_s=0.4) as opened:
        sequence = opened.submit("a", there.address, submission(), nothing)
        await sequence.receive(5)
        there.script.mute = True
        lost = await loss(sequence)
        assert not lost.alone
        assert opened.unreachable() == {"a"}


async def test_a_runner_without_news_but_signs_of_life_keeps_its_sequences() -> None:
    async with runner(stalled=True) as there, sessions(silence_s=0.5) as opened:
        sequence = opened.submit("a", there.address, submission(tokens=5), nothing)
        async with asyncio.timeout(10):
            while there.pings < 15:  # three silences long
                await asyncio.sleep(0.02)
        there.script.stalled = False
        assert await whole(sequence) == expected_ids("x", 5)


async def test_a_router_speaks_every_second_however_patient_it_is() -> None:
    async with runner(stalled=True) as there, sessions(silence_s=60) as opened:
        opened.submit("a", there.address, submission(), nothing)
        async with asyncio.timeout(5):
            while there.pings < 3:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(("number", "alone"), [(1, True), (2, False)])
async def test_only_a_sequence_that_was_alone_is_suspected_of_a_crash(
    number: int, alone: bool
) -> None:
    async with runner() as there, sessions() as opened:
        sequences = [
            opened.submit("a", there.address, submission(f"prompt {n}"), nothing)
            for n in range(number)
        ]
        for sequence in sequences:
            await sequence.receive(5)
        await there.die()
        assert {(await loss(sequence)).alone for sequence in sequences} == {alone}


async def test_two_runners_of_one_id_do_not_pile_up_sessions() -> None:
    async with runner() as one, runner() as two, sessions() as opened:
        before = len(asyncio.all_tasks())
        for n in range(30):
            for there in (one, two):
                prompt = f"prompt {n}"
                sequence = opened.submit("a", there.address, submission(prompt, 3), nothing)
                assert await whole(sequence) == expected_ids(prompt, 3)
            assert len(opened._tasks) <= 4
        async with asyncio.timeout(5):
            while len(opened._tasks) > 1:
                await asyncio.sleep(0.01)
        assert opened.unreachable() == set()
        assert len(asyncio.all_tasks()) < before + 15


async def test_a_session_to_an_old_address_ends_with_its_sequences() -> None:
    async with runner() as old, runner() as new, sessions() as opened:
        long = opened.submit("a", old.address, submission("long", 300), nothing)
        await long.receive(5)
        short = opened.submit("a", new.address, submission("short", 3), nothing)
        assert await whole(short) == expected_ids("short", 3)
        assert len(opened._tasks) == 2
        assert (await whole(long))[-1] == expected_ids("long", 300)[-1]
        async with asyncio.timeout(5):
            while len(opened._tasks) > 1:
                await asyncio.sleep(0.01)


async def test_a_channel_that_cannot_be_made_is_a_runner_out_of_reach() -> None:
    def fail(address: str) -> grpc.aio.Channel:
        raise OSError("/secret/ca.pem")

    async with sessions(connect=fail) as opened:
        with pytest.raises(Unavailable, match="its log says why") as caught:
            opened.submit("a", "127.0.0.1:1", submission(), nothing)
        assert caught.value.retry_after_s
        assert opened.unreachable() == {"a"}
        assert opened._tasks == set()


@pytest.mark.parametrize("fault", [BrokenLink.silence, BrokenLink.spoil])
async def test_streams_over_a_broken_link_are_elsewhere_soon(
    box: Box, fault: Callable[[BrokenLink], None]
) -> None:
    await box.router()
    await box.runner("a", script=Script(step_s=0.01))
    far = await box.runner("b", script=Script(step_s=0.01))
    async with BrokenLink(far.address) as link:
        far.address = link.address
        await far.heartbeat()
        streams = asyncio.create_task(box.generate_many(4, 100))
        async with asyncio.timeout(10):
            while len(far.active) < 4 or any(len(a.ids) < 10 for a in far.active.values()):
                await asyncio.sleep(0.01)
        fault(link)
        async with asyncio.timeout(15):
            answers = await streams
    for prompt, answer in answers.items():
        assert answer.ids == expected_ids(prompt, 100)
        assert answer.resumptions == 1
        assert answer.responses[-1].end.runner_id == "a"


async def test_what_is_cancelled_before_it_was_sent_is_neither_sent_nor_kept() -> None:
    async with runner() as there, sessions() as opened:
        for _ in range(50):
            opened.submit("a", there.address, submission("cancelled"), nothing).cancel()
        ids = await whole(opened.submit("a", there.address, submission("kept", 3), nothing))
        assert ids == expected_ids("kept", 3)
        assert [s.request.prompt for s in there.submissions] == ["kept"]
        assert there.cancelled == 0
