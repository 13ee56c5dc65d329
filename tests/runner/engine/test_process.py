"""The engine's own process, over a real socket pair."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tiny_models import TinyEngine, make_model

from granatum.runner.adapters.images.image import ImageShape, random_image
from granatum.runner.channel import Channel, ChannelClosed, socket_pair
from granatum.runner.engine.execution.executor import Executor, Flight
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.engine.process import LOST_STATUS, EngineOptions, OpenSource, run, serve
from granatum.runner.engine.scheduling.failures import STEP_FAILED
from granatum.runner.engine.scheduling.plan import Plan
from granatum.runner.model.adapter_loader import MemoryImages
from granatum.runner.records import (
    Cancel,
    Command,
    Departure,
    EngineFault,
    Failure,
    Finish,
    Ready,
    Report,
    SequenceNews,
    SetDraining,
    StepReport,
    Stop,
    Submit,
)

ADAPTER = "a" * 64


def one_image(shape: ImageShape) -> MemoryImages:
    return MemoryImages({ADAPTER: random_image(shape, rank=8, seed=0)})


@dataclass
class Started:
    """An engine process and our end of its channel."""

    process: multiprocessing.process.BaseProcess
    channel: Channel[Command, Report]
    ready: Ready
    recorder: FlightRecorder

    def news(self, until: int) -> list[SequenceNews]:
        """News, up to the outcome of sequence `until`."""
        return [news for report in self.reports(until) for news in report.news]

    def reports(self, until: int) -> list[StepReport]:
        """Reports, up to that with the outcome of sequence `until`."""
        heard: list[StepReport] = []
        while not any(n.sequence_id == until and n.outcome for r in heard for n in r.news):
            for report in self.channel.receive_all(20):
                assert isinstance(report, StepReport)
                heard.append(report)
        return heard


def run_until_lost(
    options: EngineOptions, images: OpenSource, end: socket.socket, recorder: FlightRecorder
) -> None:
    """An engine whose device is gone at the first step with sequences."""

    def launch(executor: Executor, plan: Plan) -> Flight:
        raise RuntimeError(f"no device for {len(plan.spans)} sequences")

    patch = pytest.MonkeyPatch()
    patch.setattr(Executor, "launch", launch)
    patch.setattr(Executor, "is_lost", lambda _: True)
    run(options, images, end, recorder)


def start(model: Path, main: Callable[..., None] = run) -> Started:
    recorder = FlightRecorder(4)
    ours, theirs = socket_pair()
    options = EngineOptions(
        model, "cpu", max_batch=4, max_waiting=4, prefill_tokens=32, max_rank=8,
        arena_bytes=1 << 20, host_cache_bytes=1 << 18,
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=main, args=(options, one_image, theirs, recorder), daemon=True)
    process.start()
    theirs.close()
    channel: Channel[Command, Report] = Channel(ours)
    (ready,) = channel.receive_all(60)
    assert isinstance(ready, Ready)
    return Started(process, channel, ready, recorder)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    path = tmp_path_factory.mktemp("model")
    make_model(path, "llama_mha")
    engine = start(path)
    yield engine
    engine.channel.send(Stop())
    engine.process.join(20)
    assert engine.process.exitcode == 0


def test_ready_says_what_it_can_hold(started: Started) -> None:
    figures = started.ready.figures
    assert (started.ready.max_batch, started.ready.page_tokens) == (4, 16)
    assert figures.total_pages == figures.free_pages == (1 << 20) // (16 * 256 * 4)
    assert started.ready.max_context == 512
    assert started.ready.max_rank == 8
    host_pages = (1 << 18) // (16 * 256 * 4)
    assert started.ready.max_adapter_elements == host_pages * 16 * 256
    assert 0 < started.ready.step_s < 5


def test_sequences_come_back_token_by_token(started: Started) -> None:
    for i in range(6):
        started.channel.send(Submit(i, (1, 2, 3 + i), max_tokens=8))
    heard = started.news(until=5)
    for i in range(6):
        mine = [n for n in heard if n.sequence_id == i]
        assert sum(len(n.tokens) for n in mine) == 8
        assert [n.outcome for n in mine] == [None] * 7 + [Finish.LENGTH]


def test_an_idle_engine_proves_twice_a_second_that_it_computes(started: Started) -> None:
    began = time.monotonic()
    reports: list[Report] = []
    while len(reports) < 4:
        reports += started.channel.receive_all(1)
        assert time.monotonic() - began < 3
    assert all(isinstance(r, StepReport) and not r.news for r in reports)


def test_cancel_and_drain(started: Started) -> None:
    for i in range(10, 13):
        started.channel.send(Submit(i, (5, i), max_tokens=500))
    started.channel.send(Cancel(10))
    started.channel.send(SetDraining(draining=True))
    started.channel.send(Submit(13, (1,), max_tokens=2))
    heard = {n.sequence_id: n.outcome for n in started.news(until=13) if n.outcome}
    assert heard == {11: Departure.DRAINED, 12: Departure.DRAINED, 13: Departure.REFUSED}
    started.channel.send(SetDraining(draining=False))
    started.channel.send(Submit(14, (1,), max_tokens=2))
    assert started.news(until=14)[-1].outcome is Finish.LENGTH


def test_a_bad_adapter_fails_its_own_sequence_alone(started: Started) -> None:
    started.channel.send(Submit(20, (1, 2), adapter="f" * 64, max_tokens=5))
    started.channel.send(Submit(21, (1, 2), max_tokens=200))
    heard = started.news(until=21)
    outcomes = {n.sequence_id: n.outcome for n in heard if n.outcome}
    assert outcomes[21] is Finish.LENGTH
    assert outcomes[20] is Departure.LOAD_FAILED
    (cause,) = [n.cause for n in heard if n.cause]
    assert cause.reason == "INTERNAL"


def test_adapters_on_the_device_are_told_when_they_change(started: Started) -> None:
    for i in (25, 26):
        started.channel.send(Submit(i, (1, 2), adapter=ADAPTER, max_tokens=8))
    told = [report.resident for report in started.reports(until=26)]
    assert [resident for resident in told if resident is not None] == [(ADAPTER,)]
    started.channel.send(Submit(27, (1, 2), adapter=ADAPTER, max_tokens=8))
    assert {report.resident for report in started.reports(until=27)} == {None}


def test_ctrl_c_is_the_fronts_business(started: Started) -> None:
    assert started.process.pid is not None
    os.kill(started.process.pid, signal.SIGINT)
    started.channel.send(Submit(30, (1, 2), max_tokens=3))
    assert started.news(until=30)[-1].outcome is Finish.LENGTH


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TinyEngine]:
    make_model(tmp_path, "llama_mha")
    engine = TinyEngine(tmp_path, max_rank=8)
    yield engine
    engine.close()


def test_it_ends_when_the_front_is_gone(engine: TinyEngine) -> None:
    ours, theirs = socket_pair()
    ours.close()
    with pytest.raises(ChannelClosed):
        serve(engine.engine, Channel(theirs))


def test_tokens_that_the_model_does_not_have_are_refused(started: Started) -> None:
    for i, prompt, generated in ((40, (1, 160), ()), (41, (1,), (159, 4_000_000_000))):
        started.channel.send(Submit(i, prompt, generated, max_tokens=9))
    started.channel.send(Submit(42, (159, 0), max_tokens=3))
    outcomes = {n.sequence_id: n.outcome for n in started.news(until=42) if n.outcome}
    for i in (40, 41):
        failure = outcomes[i]
        assert isinstance(failure, Failure)
        assert (failure.code, failure.reason, failure.field) == (3, "TOKEN_ID", "token_ids")
    assert outcomes[42] is Finish.LENGTH


def test_an_error_of_a_step_ends_its_sequence_and_no_other(engine: TinyEngine) -> None:
    """Such a token passes here: this engine was not told how many there are."""
    submits = [Submit(i, (3, 1 + i), max_tokens=12) for i in range(3)]
    alone = {i: told.tokens for i, told in engine.run(*submits).items()}
    ours, theirs = socket_pair()
    front: Channel[Command, Report] = Channel(ours)
    for submit in (*submits, Submit(9, (10**6,), max_tokens=3)):
        front.send(submit)
    with capture_logs(), ThreadPoolExecutor(1) as threads:
        served = threads.submit(serve, engine.engine, Channel(theirs))
        reports: list[StepReport] = []
        while sum(n.outcome is not None for r in reports for n in r.news) < 4:
            reports += [r for r in front.receive_all(20) if isinstance(r, StepReport)]
        front.send(Stop())
        served.result(20)
    news = [n for report in reports for n in report.news]
    outcomes = {n.sequence_id: n.outcome for n in news if n.outcome}
    assert outcomes == {**dict.fromkeys(range(3), Finish.LENGTH), 9: STEP_FAILED}
    told = {i: [t for n in news if n.sequence_id == i for t in n.tokens] for i in range(3)}
    assert told == alone


def test_a_lost_device_is_said_and_ends_the_process(tmp_path: Path) -> None:
    make_model(tmp_path, "llama_mha")
    engine = start(tmp_path, run_until_lost)
    for i in (5, 6):
        engine.channel.send(Submit(i, (1, 2), max_tokens=5))
    reports: list[Report] = []
    while not any(isinstance(report, EngineFault) for report in reports):
        reports += engine.channel.receive_all(20)
    (fault,) = (report for report in reports if isinstance(report, EngineFault))
    assert set(fault.sequences) <= {5, 6}
    assert "no device" in fault.message
    engine.process.join(20)
    assert engine.process.exitcode == LOST_STATUS
    assert engine.recorder.read() == fault.sequences
