"""An executor without a device, an engine over it, and faults to inject."""

from collections.abc import Callable
from dataclasses import dataclass, field

from toy_model import next_token

from granatum.runner.adapters.residency import AdapterFigures
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.pages import PagePool
from granatum.runner.records import Submit, TokenLogprobs

LIMITS = EngineLimits(4, max_waiting=100, prefill_tokens=16, page_tokens=4, max_context=64)


Fault = Callable[[Plan], bool]


def never(plan: Plan) -> bool:
    return False


@dataclass
class ToyFlight:
    plan: Plan
    tokens: list[int]
    unsound: frozenset[int]
    is_broken: bool

    def wait(self) -> tuple[list[int], dict[int, TokenLogprobs], frozenset[int]]:
        if self.is_broken:
            raise RuntimeError("the step's results do not come")
        return self.tokens, {}, self.unsound


@dataclass
class ToyExecutor:
    """Fails where it is told to; what a sequence drew in steps in vain is overwritten."""

    fails_launch: Fault = never
    fails_wait: Fault = never
    unsound: frozenset[int] = frozenset()
    lost: bool = False
    drawn: dict[int, list[int]] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    before_launch: Callable[[Plan], None] = lambda plan: None

    def launch(self, plan: Plan) -> ToyFlight:
        self.before_launch(plan)
        self.plans.append(plan)
        if self.fails_launch(plan):
            raise ValueError("the step cannot be launched")
        tokens = []
        for span in plan.sampling:
            sequence = span.sequence
            known = self.drawn.setdefault(sequence.id, [])
            known[: len(sequence.tokens)] = sequence.tokens
            del known[span.start + span.rows :]
            assert len(known) == span.start + span.rows, "the step's input is not what came before"
            known.append(next_token(known))
            tokens.append(known[-1])
        ids = frozenset(span.sequence.id for span in plan.sampling)
        return ToyFlight(plan, tokens, self.unsound & ids, self.fails_wait(plan))

    def forget(self, plan: Plan) -> None:
        pass

    def is_lost(self) -> bool:
        return self.lost

    def probe(self) -> None:
        if self.lost:
            raise RuntimeError("no device")


def failing(where: str, fault: Fault) -> ToyExecutor:
    """An executor with a fault at the `launch` of a step, or at the `wait` for its results."""
    return ToyExecutor(fails_launch=fault) if where == "launch" else ToyExecutor(fails_wait=fault)


class ToyAdapters:
    """Every adapter is there; `acquire`, `poll` and `release` fail where they are told to."""

    figures = AdapterFigures((), 0, 0, trouble="the disk is full")

    def __init__(self) -> None:
        self.fails_poll = False

    def acquire(self, digest: str) -> int:
        return int(digest)

    def await_copy(self) -> None:
        pass

    def release(self, digest: str) -> None:
        if digest == "13":
            raise KeyError(digest)

    def pages_of(self, digest: str) -> int:
        if digest == "7":
            raise KeyError(digest)
        return 0

    def poll(self) -> None:
        if self.fails_poll:
            raise OSError("no copies")

    def reclaim(self, pages: int) -> int:
        return 0


class Bench:
    """An engine over the toys, and what it said."""

    def __init__(
        self, executor: ToyExecutor, limits: EngineLimits = LIMITS, pages: int = 200
    ) -> None:
        self.pool = PagePool(pages)
        self.adapters = ToyAdapters()
        self.recorder = FlightRecorder(limits.max_batch)
        self.engine = Engine(executor, limits, self.pool, self.adapters, self.recorder)  # type: ignore[arg-type]
        self.tokens: dict[int, list[int]] = {}
        self.outcomes: dict[int, object] = {}

    def submit(self, *submits: Submit) -> None:
        for submit in submits:
            self.tokens[submit.sequence_id] = []
            self.engine.submit(submit)

    def step(self) -> None:
        for news in self.engine.step():
            assert news.sequence_id not in self.outcomes, "news after the last"
            self.tokens[news.sequence_id] += news.tokens
            if news.outcome is not None:
                self.outcomes[news.sequence_id] = news.outcome

    def run(self, *submits: Submit, steps: int = 2000) -> None:
        self.submit(*submits)
        for _ in range(steps):
            if not self.engine.busy:
                return
            self.step()
        raise AssertionError("sequences are left")


def holds(sequence_id: int, length: int = 0) -> Fault:
    """A step with this sequence, once it computes its token of this index or a later one."""

    def fault(plan: Plan) -> bool:
        return any(s.sequence.id == sequence_id and s.start + s.rows > length for s in plan.spans)

    return fault


def crowd(number: int = 6, tokens: int = 12) -> list[Submit]:
    return [Submit(i, (3, i, *range(i)), max_tokens=tokens + i) for i in range(number)]
