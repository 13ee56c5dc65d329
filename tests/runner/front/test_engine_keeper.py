"""Engines that die, hang and come back, played by the test over real channels."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.channel import AsyncChannel, ChannelClosed, socket_pair
from granatum.runner.front import engine_keeper
from granatum.runner.front.engine_end import EngineEnd
from granatum.runner.front.engine_keeper import EngineKeeper
from granatum.runner.front.front import Front
from granatum.runner.front.session import Session
from granatum.runner.records import (
    Cancel,
    Command,
    EngineFault,
    EngineFigures,
    Ready,
    Report,
    SequenceNews,
    SetDraining,
    StepReport,
    Submit,
)
from granatum.runner.text.tokenizer import Tokenizer
from granatum.service.tasks import cancelled
from granatum.v1 import runner_pb2
from granatum.v1.errors import PreconditionFailed
from granatum.v1.inference_pb2 import GenerateRequest
from granatum.v1.runner_pb2 import SequenceOutput, SessionRequest, SubmitSequence

FIGURES = EngineFigures(0, 100, 100, 0, 0, 0, 0, 0)
READY = Ready(max_batch=4, page_tokens=16, max_context=256, figures=FIGURES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return Tokenizer(directory)


class Child:
    """An engine's process: `end` is how it ends once its channel closes."""

    def __init__(self) -> None:
        self._front, self._engine = socket_pair()
        self.end = EngineEnd(-9)
        self.killed = False
        self.channel: AsyncChannel[Report, Command]

    async def connect(self) -> AsyncChannel[Command, Report]:
        self.channel = await AsyncChannel.open(self._engine)
        return await AsyncChannel.open(self._front)

    def kill(self) -> None:
        self.killed = True
        self.channel.close()

    async def ended(self, grace_s: float) -> EngineEnd:
        return self.end

    def dies(self, end: EngineEnd) -> None:
        self.end = end
        self.channel.close()

    async def told(self) -> list[Command]:
        """All that it was told until its channel closed."""
        commands = []
        try:
            while True:
                commands.append(await asyncio.wait_for(self.channel.receive(), 5))
        except ChannelClosed:
            return commands

    async def submitted(self) -> Submit:
        command = await asyncio.wait_for(self.channel.receive(), 5)
        assert isinstance(command, Submit)
        return command


@dataclass
class Rig:
    """A front with one session, its keeper, and the engines so far."""

    front: Front
    children: list[Child]
    keeper: EngineKeeper
    keeping: "asyncio.Task[None]"
    commands: "asyncio.Queue[SessionRequest]" = field(default_factory=asyncio.Queue)
    heard: "asyncio.Queue[SequenceOutput]" = field(default_factory=asyncio.Queue)
    tasks: "list[asyncio.Task[None]]" = field(default_factory=list)

    def open(self) -> None:
        session = self.front.open()
        self.tasks += [
            asyncio.create_task(session.follow(self.says())),
            asyncio.create_task(self.hears(session)),
        ]

    async def says(self) -> AsyncIterator[SessionRequest]:
        while True:
            yield await self.commands.get()

    async def hears(self, session: Session) -> None:
        async for response in session.responses():
            for output in response.outputs:
                self.heard.put_nowait(output)

    def submit(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            submit = SubmitSequence(sequence_id=number, request=GenerateRequest(prompt="hi"))
            self.commands.put_nowait(SessionRequest(submit=submit))

    async def departures(self, number: int) -> dict[int, str]:
        """Of so many sequences, by the router's ids."""
        outputs = [await asyncio.wait_for(self.heard.get(), 5) for _ in range(number)]
        return {
            output.sequence_id: runner_pb2.Departure.Name(output.departed).removeprefix(
                "DEPARTURE_"
            )
            for output in outputs
        }

    async def another(self, number: int) -> Child:
        """The engine of that number, connected."""
        await until(lambda: len(self.children) > number and hasattr(self.children[-1], "channel"))
        return self.children[number]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


@pytest.fixture
async def rig(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(engine_keeper, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(engine_keeper, "_TURN_S", 0.01)
    children = [Child()]

    def start() -> Child:
        children.append(Child())
        return children[-1]

    front = Front(await children[0].connect(), tokenizer, vocabulary=259)
    keeper = EngineKeeper(front, children[0], start)
    keeping = asyncio.create_task(keeper.run())
    rig = Rig(front, children, keeper, keeping)
    yield rig
    front.end_sessions()
    await cancelled(keeping, *rig.tasks)
    front.stop()
    for child in children:
        if hasattr(child, "channel"):
            child.channel.close()


@pytest.fixture
async def ready(rig: Rig) -> Rig:
    rig.children[0].channel.send(READY)
    await rig.front.loaded.wait()
    rig.open()
    return rig


async def started(rig: Rig, number: int) -> list[int]:
    """So many sequences, from 1 on, in the engine; its ids of them."""
    rig.submit(range(1, number + 1))
    return [(await rig.children[-1].submitted()).sequence_id for _ in range(number)]


async def test_killed_engine_points_at_nobody_and_another_takes_over(ready: Rig) -> None:
    ids = await started(ready, 2)
    ready.children[0].dies(EngineEnd(-9, step=tuple(ids)))
    assert await ready.departures(2) == {1: "ENGINE_LOST", 2: "ENGINE_LOST"}
    assert not ready.front.serving
    ready.submit([3])
    assert await ready.departures(1) == {3: "REFUSED"}
    other = await ready.another(1)
    other.channel.send(READY)
    await until(lambda: ready.front.serving)
    ready.submit([4])
    submit = await other.submitted()
    assert submit.sequence_id not in ids
    other.channel.send(StepReport((SequenceNews(submit.sequence_id, (65,)),), FIGURES))
    assert (await asyncio.wait_for(ready.heard.get(), 5)).tokens[0].text == "A"


async def test_crash_points_at_the_step_alone(ready: Rig) -> None:
    ids = await started(ready, 3)
    ready.children[0].dies(EngineEnd(-11, step=(ids[0], ids[2])))
    assert await ready.departures(3) == {1: "SUSPECTED", 2: "ENGINE_LOST", 3: "SUSPECTED"}


async def test_crash_over_one_sequence_blames_it(ready: Rig) -> None:
    ids = await started(ready, 2)
    ready.children[0].dies(EngineEnd(-6, step=(ids[1],)))
    assert await ready.departures(2) == {1: "ENGINE_LOST", 2: "BLAMED"}


async def test_engines_last_word_counts_though_its_process_does_not_end(ready: Rig) -> None:
    ids = await started(ready, 2)
    ready.children[0].channel.send(EngineFault((ids[0],), "illegal memory access"))
    assert await ready.departures(2) == {1: "BLAMED", 2: "ENGINE_LOST"}
    await ready.another(1)


async def test_reports_that_cannot_be_read_end_the_engine_not_the_front(ready: Rig) -> None:
    await started(ready, 1)
    channel: AsyncChannel[object, object] = ready.children[0].channel  # type: ignore[assignment]
    channel.send("nonsense")
    assert await ready.departures(1) == {1: "ENGINE_LOST"}
    assert ready.children[0].killed
    await ready.another(1)


async def test_first_engine_that_cannot_start_ends_the_runner(rig: Rig) -> None:
    rig.children[0].dies(EngineEnd(1, cause="give it more memory"))
    with pytest.raises(PreconditionFailed, match="cannot start: give it more memory"):
        await asyncio.wait_for(rig.keeping, 5)


async def test_later_engine_that_cannot_start_is_tried_again(ready: Rig) -> None:
    ready.children[0].dies(EngineEnd(-9))
    (await ready.another(1)).dies(EngineEnd(1, cause="no memory"))
    (await ready.another(2)).channel.send(READY)
    await until(lambda: ready.front.serving)
    assert not ready.keeping.done()


async def test_next_engine_drains_if_the_runner_does(ready: Rig) -> None:
    ready.front.set_draining(True)
    ready.children[0].dies(EngineEnd(-9))
    other = await ready.another(1)
    assert await asyncio.wait_for(other.channel.receive(), 5) == SetDraining(True)


async def test_silent_engine_loses_its_work_and_may_come_back(
    ready: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGSTOP and SIGCONT have it: what it says of the lost ones afterwards counts no more."""
    monkeypatch.setattr("granatum.runner.front.front._STALE_S", 0.2)
    child = ready.children[0]
    ids = await started(ready, 2)
    assert await ready.departures(2) == {1: "ENGINE_LOST", 2: "ENGINE_LOST"}
    assert not ready.front.serving
    ready.submit([3])
    assert await ready.departures(1) == {3: "REFUSED"}
    told = [await asyncio.wait_for(child.channel.receive(), 5) for _ in ids]
    assert told == [Cancel(number) for number in ids]
    child.channel.send(StepReport((SequenceNews(ids[0], (65,)),), FIGURES))
    await until(lambda: ready.front.serving)
    ready.submit([4])
    submit = await child.submitted()
    child.channel.send(StepReport((SequenceNews(submit.sequence_id, (66,)),), FIGURES))
    output = await asyncio.wait_for(ready.heard.get(), 5)
    assert (output.sequence_id, [t.text for t in output.tokens]) == (4, ["B"])
    assert len(ready.children) == 1


async def test_bound_of_silence_grows_with_the_steps(rig: Rig) -> None:
    rig.children[0].channel.send(Ready(4, 16, 256, FIGURES, step_s=2.0))
    await rig.front.loaded.wait()
    rig.front._reported = asyncio.get_running_loop().time() - 7.5
    assert not rig.front.is_stale()
    rig.front._reported -= 1
    assert rig.front.is_stale()


async def test_engine_that_stays_silent_is_replaced(
    ready: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granatum.runner.front.front._STALE_S", 0.1)
    monkeypatch.setattr(engine_keeper, "_HUNG_S", 0.3)
    (await ready.another(1)).channel.send(READY)
    assert ready.children[0].killed
    await until(lambda: ready.front.serving)


async def test_later_engine_that_never_gets_ready_is_replaced(ready: Rig) -> None:
    """The first may take as long as it likes: whoever started the runner sees it."""
    ready.keeper._start_s = 0.1
    ready.children[0].dies(EngineEnd(-9))
    (await ready.another(2)).channel.send(READY)
    assert ready.children[1].killed
    await until(lambda: ready.front.serving)
