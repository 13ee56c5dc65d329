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
from granatum.cli.box.process import Process
from granatum.models.config import read_config
from granatum.runner import __main__
from granatum.runner.adapters.residency import AdapterFigures
from granatum.runner.channel import Channel
from granatum.runner.engine import child as engine_child
from granatum.runner.engine.child import LastWords
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.engine.process import serve
from granatum.runner.engine.scheduling.pages import PagePool
from granatum.runner.engine.scheduling.plan import Limits, Plan
from granatum.runner.records import Command, Report, TokenLogprobs
from granatum.runner.settings import Settings

STEP_MS = "GRANATUM_BENCH_STEP_MS"
_PAGES = 1 << 16


class PacedBox(Box):
    """A box with this runner."""

    def _process(
        self, name: str, command: tuple[str, ...], env: dict[str, str] | None = None
    ) -> Process:
        if name.startswith("runner"):
            python, _, _, *arguments = command
            command = (python, str(Path(__file__).resolve()), *arguments)
        return super()._process(name, command, env)


class EveryAdapter:
    """All adapters are on the device."""

    figures = AdapterFigures((), 0, 0)

    def acquire(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """Always there."""
        return 0

    def await_copy(self) -> None:
        """Nothing is on its way."""

    def release(self, digest: str) -> None:
        """Nothing to do."""

    def pages_of(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """None."""
        return 0

    def poll(self) -> None:
        """Nothing to do."""

    def reclaim(self, pages: int) -> int:  # noqa: ARG002 - the protocol's signature
        """Nothing to give."""
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
    settings: Settings,
    end: socket.socket,
    recorder: FlightRecorder,
    words: LastWords,  # noqa: ARG001 - as the child's own main
) -> None:
    """The engine process's main."""
    config = read_config(settings.model)
    batch = settings.max_batch or 64
    limits = Limits(batch, batch, settings.prefill_tokens, 16, config.max_positions)
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
