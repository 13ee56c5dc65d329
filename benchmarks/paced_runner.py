"""A runner whose engine computes nothing and takes a given time for a step.

What it serves is what everything else can carry: front, router and client. `STEP_MS` in the
environment says how long a step takes; the rest is said as to `granatum runner`.
"""

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from granatum.cli.box.box import Box
from granatum.cli.box.children import RunnerChild
from granatum.models.config import read_config
from granatum.runner import __main__
from granatum.runner.adapters.residency import NoAdapters
from granatum.runner.channel import Channel
from granatum.runner.engine import child as engine_child
from granatum.runner.engine.child import LastWords
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.engine.process import serve
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.pages import PagePool
from granatum.runner.records import Command, Report, TokenLogprobs
from granatum.runner.settings import RunnerSettings

STEP_MS = "GRANATUM_BENCH_STEP_MS"
_PAGES = 1 << 16


class PacedChild(RunnerChild):
    """This runner as a box's process."""

    program = (str(Path(__file__).resolve()),)


class PacedBox(Box):
    """A box with this runner."""

    runner = PacedChild


class EveryAdapter(NoAdapters):
    """All adapters are on the device and take no pages."""

    def acquire(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """The slot of every adapter."""
        return 0


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that ends at a time."""

    plan: Plan
    end: float
    first_token: int

    def wait(self) -> tuple[list[int], dict[int, TokenLogprobs], frozenset[int]]:
        """Any tokens, once it is time."""
        time.sleep(max(self.end - time.monotonic(), 0))
        return [self.first_token + i for i in range(len(self.plan.sampling))], {}, frozenset()


class PacedExecutor:
    """Takes `step_s` seconds for each step, one after another."""

    def __init__(self, step_s: float, vocab: int, batch: int) -> None:
        self._step_s = step_s
        self._tokens = vocab - batch
        self._end = 0.0
        self._steps = 0

    def launch(self, plan: Plan) -> _Flight:
        """Begin a step when the one before has ended."""
        self._end = max(self._end, time.monotonic()) + self._step_s
        self._steps += 1
        return _Flight(plan, self._end, self._steps * 37 % self._tokens)

    def graph_due(self, *, idle: bool) -> bool:  # noqa: ARG002 - as the executor's own
        """Never: it has no graphs."""
        return False

    def probe(self) -> None:
        """Nothing to prove."""


def run_engine(
    settings: RunnerSettings,
    end: socket.socket,
    recorder: FlightRecorder,
    words: LastWords,  # noqa: ARG001 - as the child's own main
) -> None:
    """The engine process's main."""
    config = read_config(settings.model)
    batch = settings.max_batch or 64
    limits = EngineLimits(batch, batch, settings.prefill_tokens, 16, config.context[0])
    executor = PacedExecutor(float(os.environ[STEP_MS]) / 1e3, config.vocab, batch)
    engine = Engine(
        executor,  # type: ignore[arg-type]
        limits,
        PagePool(_PAGES),
        EveryAdapter(),
        recorder=recorder,
    )
    channel: Channel[Report, Command] = Channel(end)
    serve(engine, channel)


if __name__ == "__main__":
    engine_child._main = run_engine  # noqa: SLF001
    sys.exit(__main__.main())
