"""The real engine on a CPU, with doubles of CUDA graphs that are captured while it serves."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from tiny_models import TinyEngine, make_model

from granatum.runner.channel import Channel, socket_pair
from granatum.runner.engine.engine import EngineLost
from granatum.runner.engine.execution.executor import Executor, _shapes
from granatum.runner.engine.execution.graphs import INTERVAL_S, Graphs
from granatum.runner.engine.process import serve
from granatum.runner.model.inputs import StepShape
from granatum.runner.records import Command, Ready, Report, StepReport, Stop, Submit

SUBMITS = [Submit(i, (3, 1 + i, *range(i)), max_tokens=10 + i) for i in range(5)]


@dataclass(frozen=True)
class Graph:
    """Computes a step of its shape when it is replayed."""

    executor: Executor
    shape: StepShape

    def replay(self) -> torch.Tensor:
        return self.executor._compute(self.executor._inputs.view(self.shape))


@dataclass
class Captures:
    """Graphs for an engine's steps, by a clock that stands."""

    tiny: TinyEngine
    breaks_at: int = 1000
    now: float = 0.0
    late: list[StepShape] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executor = self.tiny.engine._executor
        shapes = _shapes(self.tiny.engine.limits)
        self.graphs = Graphs[Graph](self.capture, self.capture_later, shapes, lambda: self.now)
        self.executor._graphs = self.graphs  # type: ignore[assignment]

    def capture(self, shape: StepShape) -> Graph:
        return Graph(self.executor, shape)

    def capture_later(self, shape: StepShape) -> Graph:
        assert not self.tiny.engine.in_flight
        if len(self.late) == self.breaks_at:
            raise RuntimeError("too little memory")
        self.late.append(shape)
        return self.capture(shape)

    def pass_time(self) -> None:
        """Make a capture due, whatever runs."""
        self.now += INTERVAL_S


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyEngine]:
    make_model(tmp_path, "llama_gqa_tied")
    engine = TinyEngine(tmp_path, max_rank=8)
    yield engine
    engine.close()


def expected(tiny: TinyEngine) -> dict[int, list[int]]:
    """The tokens of an engine that launches each step in the shape that it needs."""
    return {i: told.tokens for i, told in tiny.run(*SUBMITS).items()}


def test_padded_steps_and_captures_between_them_change_no_token(tiny: TinyEngine) -> None:
    tokens, captures = expected(tiny), Captures(tiny)
    for submit in SUBMITS:
        tiny.submit(submit)
    while tiny.engine.busy:
        captures.pass_time()
        assert tiny.engine.graph_due == bool(captures.graphs.waiting)
        if tiny.engine.graph_due:
            tiny.engine.capture()
        tiny.step()
    assert {i: told.tokens for i, told in tiny.told.items()} == tokens
    assert len(captures.late) > 5
    tiny.assert_empty()


def test_a_runner_is_ready_first_and_captures_the_rest_when_idle(tiny: TinyEngine) -> None:
    tokens, captures = expected(tiny), Captures(tiny)
    waiting = captures.graphs.waiting
    ours, theirs = socket_pair()
    front: Channel[Command, Report] = Channel(ours)
    for submit in SUBMITS:
        front.send(submit)
    with ThreadPoolExecutor(1) as threads:
        served = threads.submit(serve, tiny.engine, Channel(theirs))
        heard: list[Report] = []
        while captures.graphs.waiting or not done(heard):
            heard += front.receive_all(20)
        front.send(Stop())
        served.result(20)
    assert isinstance(heard[0], Ready)
    assert len(captures.late) == waiting
    news = [n for report in heard if isinstance(report, StepReport) for n in report.news]
    assert {i: [t for n in news if n.sequence_id == i for t in n.tokens] for i in tokens} == tokens


def done(heard: list[Report]) -> bool:
    reports = [report for report in heard if isinstance(report, StepReport)]
    return sum(n.outcome is not None for r in reports for n in r.news) == len(SUBMITS)


def test_a_capture_that_fails_ends_captures_and_no_sequence(tiny: TinyEngine) -> None:
    tokens, captures = expected(tiny), Captures(tiny, breaks_at=2)
    for submit in SUBMITS:
        tiny.submit(submit)
    with capture_logs() as logs:
        while tiny.engine.busy:
            captures.pass_time()
            if tiny.engine.graph_due:
                tiny.engine.capture()
            tiny.step()
    assert {i: told.tokens for i, told in tiny.told.items()} == tokens
    (said,) = [line for line in logs if line["event"] == "no more graphs are captured"]
    assert said["reason"] == "too little memory"
    assert len(captures.late) == 2


def test_a_capture_that_breaks_the_device_ends_the_engine(
    tiny: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = Captures(tiny, breaks_at=0)
    monkeypatch.setattr(captures.executor, "is_lost", lambda: True)
    with pytest.raises(EngineLost, match="too little memory"):
        tiny.engine.capture()
