"""One base model on one device: schedule, prepare, launch, collect.

The host runs one step ahead of the device: while a step runs, the next one is scheduled, prepared
and launched, fed with tokens that the device alone knows yet; only then the first one's tokens are
collected.
"""

from dataclasses import dataclass

from granatum.runner.adapters import Adapters
from granatum.runner.executor import Executor, Flight
from granatum.runner.pages import PagePool
from granatum.runner.records import EngineFigures, SequenceNews, Submit
from granatum.runner.scheduler import Limits, Plan, Scheduler


@dataclass(slots=True)
class _Decoded:
    """Totals of the steps that decoded."""

    steps: int = 0
    sequences: int = 0
    adapters: int = 0

    def count(self, plan: Plan) -> None:
        if plan.decodes:
            self.steps += 1
            self.sequences += len(plan.decodes)
            self.adapters += len({s.sequence.slot for s in plan.decodes} - {-1})


class Engine:
    """Runs sequences to their end, in process; `step` until `busy` is false.

    `limits`, `pool` and `adapters` bound and feed the scheduler; `executor` computes.
    """

    def __init__(
        self, executor: Executor, limits: Limits, pool: PagePool, adapters: Adapters
    ) -> None:
        self.limits = limits
        self._executor = executor
        self._pool = pool
        self._adapters = adapters
        self._scheduler = Scheduler(limits, pool, adapters)
        self._flight: Flight | None = None
        self._decoded = _Decoded()

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs, or a step is in flight."""
        return self._flight is not None or self._scheduler.sequences > 0

    @property
    def in_flight(self) -> bool:
        """Whether the device has work; if it is busy without, it waits for adapters."""
        return self._flight is not None

    @property
    def figures(self) -> EngineFigures:
        """The engine's state as heartbeats report it."""
        adapters = self._adapters.figures
        return EngineFigures(
            sequences=self._scheduler.sequences,
            total_pages=self._pool.total,
            free_pages=self._pool.free_pages,
            reclaimable_pages=adapters.reclaimable_pages,
            decode_steps=self._decoded.steps,
            decode_sequences=self._decoded.sequences,
            decode_adapters=self._decoded.adapters,
            adapter_loads=adapters.loads,
        )

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters on the device; the same object until they change."""
        return self._adapters.figures.resident

    def submit(self, submit: Submit) -> None:
        """Take in a sequence; its news come from `step`."""
        self._scheduler.submit(submit)

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence: it computes nothing from the next step on, and has no more news."""
        self._scheduler.cancel(sequence_id)

    def set_draining(self, draining: bool) -> None:
        """Give everything back and refuse what comes, or end that."""
        self._scheduler.set_draining(draining)

    def step(self) -> list[SequenceNews]:
        """Launch the next step and collect the one before."""
        plan = self._scheduler.schedule()
        flight = None
        if plan.rows:
            self._adapters.await_copy()
            flight = self._executor.launch(plan)
        news = self._collect()
        self._flight = flight
        self._decoded.count(plan)
        return news

    def probe(self) -> None:
        """Run a step without sequences, to its end: proof that the device computes."""
        self._executor.probe()

    def _collect(self) -> list[SequenceNews]:
        if self._flight is None:
            return self._scheduler.take_news()
        tokens, logprobs = self._flight.wait()
        return self._scheduler.collect(self._flight.plan, tokens, logprobs)
