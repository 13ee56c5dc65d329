"""One router's session over an engine that the test plays: each sequence fails alone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from granatum.runner.front import session as session_module
from granatum.runner.front.session import EngineAway, RouterSession
from granatum.runner.front.submission import Prepared, SequenceBounds, prepare
from granatum.runner.records import Departure, Failure, Finish, SequenceNews
from granatum.runner.text.sequence_text import SequenceText
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1 import inference_pb2, runner_pb2
from granatum.v1.errors import Code
from granatum.v1.inference_pb2 import GenerateRequest
from granatum.v1.runner_pb2 import (
    CancelSequence,
    Ping,
    SequenceOutput,
    SessionRequest,
    SubmitSequence,
)


@dataclass
class Engine:
    """Remembers what it is told; `preparing` may raise or wait first."""

    tokenizer: Tokenizer
    submitted: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    preparing: Callable[[SubmitSequence], None] = lambda _: None
    away: bool = False
    hold: asyncio.Event | None = None

    async def prepare(self, message: SubmitSequence) -> Prepared:
        self.preparing(message)
        if self.hold is not None:
            await self.hold.wait()
        number = 100 + message.sequence_id
        return prepare(number, message, self.tokenizer, SequenceBounds(259, 10_000_000))

    def submit(self, prepared: Prepared, session: RouterSession) -> None:
        if self.away:
            raise EngineAway
        self.submitted.append(prepared.submit.sequence_id)

    def cancel(self, engine_id: int) -> None:
        self.cancelled.append(engine_id)


class Router:
    """The other side of a session: what it says, and what it has heard, without empty messages."""

    def __init__(self, session: RouterSession) -> None:
        self.session = session
        self.commands: asyncio.Queue[SessionRequest | None] = asyncio.Queue()
        self.heard: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        self.signs = 0
        self.tasks = [asyncio.create_task(t) for t in (session.follow(self.says()), self.hears())]

    async def says(self) -> AsyncIterator[SessionRequest]:
        while (command := await self.commands.get()) is not None:
            yield command

    async def hears(self) -> None:
        async for response in self.session.responses():
            self.signs += not response.outputs
            for output in response.outputs:
                self.heard.put_nowait(output)

    def submit(self, number: int, prompt: str = "hi") -> None:
        submit = SubmitSequence(sequence_id=number, request=GenerateRequest(prompt=prompt))
        self.commands.put_nowait(SessionRequest(submit=submit))

    async def next(self) -> SequenceOutput:
        return await asyncio.wait_for(self.heard.get(), 5)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(tokenizer)


@pytest.fixture
async def router(engine: Engine) -> AsyncIterator[Router]:
    router = Router(RouterSession(engine))
    yield router
    router.session.end()
    await router.session.ended()
    for task in router.tasks:
        task.cancel()
    await asyncio.gather(*router.tasks, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def is_neutral(output: SequenceOutput, secret: str) -> bool:
    failed = output.failed
    return failed.code == Code.INTERNAL and secret not in failed.message and "try" in failed.message


@pytest.mark.parametrize("token", [-1, 1 << 40])
async def test_news_that_cannot_be_taken_end_their_sequence_alone(
    engine: Engine, router: Router, token: int
) -> None:
    for number in (1, 2):
        router.submit(number)
    await until(lambda: len(engine.submitted) == 2)
    router.session.take(SequenceNews(101, (token,)))
    router.session.take(SequenceNews(102, (65,)))
    one, other = await router.next(), await router.next()
    assert is_neutral(one, str(token))
    assert [t.text for t in other.tokens] == ["A"]
    assert engine.cancelled == [101]
    router.session.take(SequenceNews(101, (65,)))  # on its way before the cancellation
    router.session.take(SequenceNews(102, (66,), outcome=Finish.LENGTH))
    last = await router.next()
    assert (last.sequence_id, last.finished) == (2, inference_pb2.FINISH_REASON_LENGTH)


async def test_any_error_of_the_text_side_ends_its_sequence_alone(
    engine: Engine, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[object]:
        raise ZeroDivisionError("/secret/path")

    router.submit(1)
    await until(lambda: engine.submitted == [101])
    with monkeypatch.context() as patched:
        patched.setattr(SequenceText, "take", broken)
        router.session.take(SequenceNews(101, (65,)))
    assert is_neutral(await router.next(), "secret")
    assert engine.cancelled == [101]


async def test_any_error_before_the_engine_fails_the_sequence_at_once(
    engine: Engine, router: Router
) -> None:
    """Not in silence: a router would wait for its news for minutes."""

    def broken(message: SubmitSequence) -> None:
        if message.sequence_id == 1:
            raise ValueError("/secret/path")

    engine.preparing = broken
    router.submit(1)
    router.submit(2)
    assert is_neutral(await router.next(), "secret")
    await until(lambda: engine.submitted == [102])


async def test_error_between_preparing_and_the_engine_fails_the_sequence(
    engine: Engine, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError("/secret/path")

    monkeypatch.setattr(engine, "submit", broken)
    router.submit(1)
    assert is_neutral(await router.next(), "secret")


async def test_sequence_goes_back_while_there_is_no_engine(engine: Engine, router: Router) -> None:
    engine.away = True
    router.submit(1)
    assert (await router.next()).departed == runner_pb2.DEPARTURE_REFUSED


async def test_wrong_field_is_named_beside_the_message(router: Router) -> None:
    request = GenerateRequest(prompt="hi")
    request.sampling.temperature = -1
    submit = SubmitSequence(sequence_id=1, request=request)
    router.commands.put_nowait(SessionRequest(submit=submit))
    failed = (await router.next()).failed
    assert (failed.code, failed.field) == (Code.INVALID_ARGUMENT, "sampling.temperature")


async def test_failed_load_departs_with_its_cause(engine: Engine, router: Router) -> None:
    router.submit(1)
    await until(lambda: engine.submitted == [101])
    cause = Failure(Code.NOT_FOUND, "the store lacks it", "NOT_FOUND", "adapter")
    router.session.take(SequenceNews(101, outcome=Departure.LOAD_FAILED, cause=cause))
    output = await router.next()
    assert output.departed == runner_pb2.DEPARTURE_LOAD_FAILED
    assert (output.cause.message, output.cause.field) == ("the store lacks it", "adapter")


@pytest.mark.parametrize("preparing", [True, False])
async def test_second_sequence_of_an_id_leaves_nothing_behind(
    engine: Engine, router: Router, preparing: bool
) -> None:
    engine.hold = asyncio.Event()
    if not preparing:
        engine.hold.set()
    router.submit(1)
    if not preparing:
        await until(lambda: engine.submitted == [101])
    router.submit(1)
    assert (await router.next()).failed.code == Code.INTERNAL
    engine.hold.set()
    router.submit(3)
    await until(lambda: 103 in engine.submitted)
    assert set(engine.submitted) - set(engine.cancelled) == {103}
    assert router.heard.empty()


async def test_id_used_again_after_its_cancellation_can_be_cancelled_again(
    engine: Engine, router: Router
) -> None:
    engine.hold = asyncio.Event()
    cancel = SessionRequest(cancel=CancelSequence(sequence_id=1))
    router.submit(1)
    router.commands.put_nowait(cancel)
    router.submit(1)
    await until(router.commands.empty)
    await asyncio.sleep(0)  # the first one's task ends
    router.commands.put_nowait(cancel)
    router.submit(2)
    await until(router.commands.empty)
    engine.hold.set()
    await until(lambda: bool(engine.submitted))
    assert engine.submitted == [102]


async def test_submissions_after_the_end_run_nothing(engine: Engine, router: Router) -> None:
    router.session.end()
    router.submit(1)
    await until(router.commands.empty)
    await router.session.ended()
    assert not engine.submitted


async def test_nothing_goes_on_after_the_end(engine: Engine, router: Router) -> None:
    engine.hold = asyncio.Event()
    router.submit(1)
    await until(lambda: bool(router.session._tasks))
    router.session.end()
    await router.session.ended()
    assert not router.session._tasks
    assert not router.session._preparing


async def test_idle_session_shows_signs_of_life(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LIFE_S", 0.01)
    router = Router(RouterSession(engine))
    await until(lambda: router.signs >= 3)
    router.session.end()
    await asyncio.wait_for(router.tasks[1], 5)
    router.tasks[0].cancel()


async def test_silent_router_is_noticed_and_a_ping_is_no_silence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LIFE_S", 0.04)
    monkeypatch.setattr(session_module, "SILENT_S", 0.4)
    router = Router(RouterSession(engine))
    neglected = asyncio.create_task(router.session.neglected())
    for _ in range(20):
        router.commands.put_nowait(SessionRequest(ping=Ping()))
        await asyncio.sleep(0.05)
    assert not neglected.done()
    assert "silent" in await asyncio.wait_for(neglected, 5)
    for task in router.tasks:
        task.cancel()


async def test_router_that_does_not_read_is_noticed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LIFE_S", 0.02)
    monkeypatch.setattr(session_module, "STUCK_S", 0.2)
    session = RouterSession(engine)
    responses = session.responses()
    neglected = asyncio.create_task(session.neglected())
    for _ in range(30):  # a reader, however slow
        await anext(responses)
    assert not neglected.done()
    assert "read" in await asyncio.wait_for(neglected, 5)


async def test_what_waits_for_a_router_is_bounded(
    engine: Engine, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "LIFE_S", 0.02)
    monkeypatch.setattr(session_module, "UNREAD_BYTES", 10_000)
    router.tasks[1].cancel()
    router.submit(1)
    await until(lambda: engine.submitted == [101])
    neglected = asyncio.create_task(router.session.neglected())
    for _ in range(2_000):
        router.session.take(SequenceNews(101, (65,)))
    assert "read" in await asyncio.wait_for(neglected, 5)
