"""One base model on one device: schedule, prepare, launch, collect.

The host runs one step ahead of the device. While a step runs, the engine schedules, prepares and
launches the next one. The next step is fed on the device with tokens that the host does not know
yet. Only then does the engine collect the tokens of the first step.
"""

from dataclasses import dataclass

import structlog

from granatum.runner.adapters.residency import Adapters
from granatum.runner.engine.execution.executor import Executor, Flight
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.engine.scheduling.failures import STEP_FAILED
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.engine.scheduling.scheduler import Scheduler
from granatum.runner.pages import PagePool
from granatum.runner.records import EngineFigures, SequenceNews, Submit

MOST_UNPLANNED = 5
"""The failures to plan in a row, caused by no sequence, after which the engine gives up."""

log = structlog.get_logger(__name__)


class EngineLost(Exception):
    """The engine cannot go on: its device is gone, or its books are wrong.

    `sequences`: the ids of the sequences in the steps in flight.
    """

    def __init__(self, sequences: tuple[int, ...], message: str) -> None:
        super().__init__(message)
        self.sequences = sequences


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine says of itself beside its limits; records.Ready explains each."""

    max_rank: int = 0
    max_adapter_elements: int = 0
    step_s: float = 0.0


@dataclass(slots=True)
class _Decoded:
    """Totals over all steps that decoded."""

    steps: int = 0
    sequences: int = 0
    adapters: int = 0

    def count(self, plan: Plan) -> None:
        if plan.decodes:
            self.steps += 1
            self.sequences += len(plan.decodes)
            self.adapters += len({s.sequence.slot for s in plan.decodes} - {-1})


class Engine:
    """Runs sequences to their end, in this process; call `step` until `busy` is false.

    `limits`, `pool` and `adapters` bound and feed the scheduler. `executor` computes. `recorder`
    learns of each step before its launch.

    An exception in a step is pinned on the step's sequences: they end or become suspects, and all
    others go on. An exception of no sequence is raised as EngineLost if it comes again and again.
    An exception while the scheduler takes in results is raised as EngineLost at once: the books are
    wrong, and one tenant's pages might become another's.
    """

    def __init__(
        self,
        executor: Executor,
        limits: EngineLimits,
        pool: PagePool,
        adapters: Adapters,
        recorder: FlightRecorder | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        self.limits = limits
        self.capacity = capacity or Capacity()
        self._executor = executor
        self._pool = pool
        self._adapters = adapters
        self._recorder = recorder or FlightRecorder(limits.max_batch)
        self._scheduler = Scheduler(limits, pool, adapters)
        self._flight: Flight | None = None
        self._news: list[SequenceNews] = []
        self._unplanned = 0
        self._decoded = _Decoded()

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs, or a step is in flight."""
        return self._flight is not None or self._scheduler.sequences > 0

    @property
    def in_flight(self) -> bool:
        """Whether the device has work; an engine that is busy without it waits for adapters."""
        return self._flight is not None

    @property
    def graph_due(self) -> bool:
        """Whether `capture` should be called before the next step."""
        return self._executor.graph_due(idle=not self.busy)

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
            load_trouble=adapters.trouble,
        )

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters on the device; the same object until they change."""
        return self._adapters.figures.resident

    def submit(self, submit: Submit) -> None:
        """Queue a sequence; `step` returns its news."""
        try:
            self._scheduler.submit(submit)
        except Exception:
            log.exception("a sequence could not be queued", sequence=submit.sequence_id)
            self._scheduler.refuse(submit.sequence_id, STEP_FAILED)

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence: no later step computes it, and there are no more news of it."""
        try:
            self._scheduler.cancel(sequence_id)
        except Exception:  # its pages stay taken, so nobody else can get them
            log.exception("a sequence could not be cancelled", sequence=sequence_id)

    def set_draining(self, draining: bool) -> None:
        """Give all sequences back and refuse new ones, or serve again."""
        try:
            self._scheduler.set_draining(draining)
        except Exception:  # the front waits for the others no longer than its grace
            log.exception("not every sequence could be sent away")

    def step(self) -> list[SequenceNews]:
        """Launch the next step and collect the one before.

        A suspect's step has the device to itself: the step before it is collected first, and the
        suspect's own step at once. If the process dies meanwhile, only the suspect is to blame.

        Raises:
            EngineLost: nothing can be computed any more.
        """
        plan = self._plan()
        if plan.solo:
            self._collect()
        self._launch(plan)
        if plan.solo:
            self._collect()
        news, self._news = self._news + self._scheduler.take_news(), []
        return news

    def capture(self) -> None:
        """Capture the CUDA graph that is due, with no step in flight.

        The step in flight is collected first; `step` returns its news. If the capture fails on a
        device that still works, the graphs that there are go on serving.
        """
        self._collect()
        try:
            self._executor.capture_next()
        except Exception as error:
            self._raise_if_lost(error)
            log.warning("no more graphs are captured", reason=str(error))

    def probe(self) -> None:
        """Run a step without sequences to its end, which proves that the device computes."""
        try:
            self._executor.probe()
        except Exception as error:
            raise EngineLost((), str(error)) from error

    def _plan(self) -> Plan:
        """The next step; an empty one if planning failed.

        The scheduler changes its books one sequence at a time, so a failure belongs to the sequence
        that it considered. If it considered none, the adapters' copies failed, and the next step
        tries them again.
        """
        try:
            plan = self._scheduler.schedule()
        except Exception as error:
            self._raise_if_lost(error)
            log.exception("a step could not be planned")
            if not self._scheduler.pin_considered():
                self._unplanned += 1
            if self._unplanned >= MOST_UNPLANNED:
                raise EngineLost(self._recorder.read(), str(error)) from error
            return Plan()
        self._unplanned = 0
        return plan

    def _launch(self, plan: Plan) -> None:
        """Launch `plan` and then collect the step before; pin a failed launch on `plan`."""
        before, self._flight = self._flight, None
        fault: Exception | None = None
        if plan.rows:
            try:
                self._recorder.begin([span.sequence.id for span in plan.spans])
                self._adapters.await_copy()
                self._flight = self._executor.launch(plan)
                self._decoded.count(plan)
            except Exception as error:
                fault = error
        if before is not None:
            self._land(before)
        if fault is not None:
            self._pin(plan, fault)

    def _collect(self) -> None:
        """Collect the step in flight, and launch none behind it."""
        self._launch(Plan())

    def _land(self, flight: Flight) -> None:
        """Take in the results of a step; if they do not come, pin the failure on its sequences."""
        try:
            landed = flight.wait()
        except Exception as error:
            behind, self._flight = self._flight, None
            self._raise_if_lost(error)  # the device works, so the step behind has ended too
            if behind is not None:  # it was fed with tokens that are worth nothing
                self._take_back(behind.plan)
            self._pin(flight.plan, error)
            return
        try:
            self._news += self._scheduler.collect(flight.plan, *landed)
        except Exception as error:
            lost = f"the books are wrong: {error!r}"
            raise EngineLost(self._recorder.read(), lost) from error
        self._recorder.end()

    def _pin(self, plan: Plan, error: Exception) -> None:
        """A step failed: take it back, and have its sequences answer for it."""
        self._raise_if_lost(error)
        ids = [span.sequence.id for span in plan.spans]
        log.error("a step failed", sequences=ids, alone=plan.solo, exc_info=error)
        self._take_back(plan)
        self._scheduler.pin(plan)

    def _take_back(self, plan: Plan) -> None:
        self._executor.forget(plan)
        self._scheduler.abandon(plan)
        self._recorder.end()

    def _raise_if_lost(self, error: Exception) -> None:
        if self._executor.is_lost():
            raise EngineLost(self._recorder.read(), str(error)) from error
