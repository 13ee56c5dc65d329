"""A simulated engine that runs a scheduler one step ahead; microseconds, no torch."""

from dataclasses import replace

from toy_model import next_token

from granatum.runner.adapters.residency import AdapterFigures, NoAdapters
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.engine.scheduling.scheduler import Scheduler
from granatum.runner.pages import PagePool
from granatum.runner.records import SequenceNews, Submit
from granatum.v1.errors import Unavailable


class ToyAdapters:
    """Adapters of `size` pages each that arrive `delay` polls after they were asked for."""

    def __init__(self, pool: PagePool, size: int = 2, delay: int = 2) -> None:
        self.pool, self.size, self.delay = pool, size, delay
        self.coming: dict[str, int] = {}
        self.pages: dict[str, tuple[int, ...]] = {}
        self.users: dict[str, int] = {}
        self.loads = 0

    def acquire(self, digest: str) -> int | None:
        if digest.startswith("bad"):
            raise Unavailable("the store is away")
        if digest in self.pages:
            self.users[digest] += 1
            self.pages[digest] = self.pages.pop(digest)
            return int(digest, 16)
        self.coming.setdefault(digest, self.delay)
        return None

    def await_copy(self) -> None:
        pass

    def release(self, digest: str) -> None:
        self.users[digest] -= 1
        assert self.users[digest] >= 0

    def pages_of(self, digest: str) -> int:
        return self.size

    def poll(self) -> None:
        for digest in tuple(self.coming):
            self.coming[digest] -= 1
            if self.coming[digest] <= 0:
                missing = self.size - self.pool.free_pages
                if missing > 0:
                    self.reclaim(missing)
                pages = self.pool.allocate(self.size)
                if pages is not None:
                    del self.coming[digest]
                    self.pages[digest], self.users[digest] = pages, 0
                    self.loads += 1

    def reclaim(self, pages: int) -> int:
        freed = 0
        for digest in tuple(self.pages):
            if freed < pages and not self.users[digest]:
                gone = self.pages.pop(digest)
                self.pool.free(gone)
                freed += len(gone)
        return freed

    @property
    def figures(self) -> AdapterFigures:
        idle = sum(len(p) for d, p in self.pages.items() if not self.users[d])
        return AdapterFigures(tuple(self.pages), self.loads, idle)


class ToyEngine:
    """Runs a scheduler one step ahead and keeps what each sequence was told."""

    def __init__(self, limits: EngineLimits, pages: int, adapters: bool = True) -> None:
        self.pool = PagePool(pages)
        self.adapters = ToyAdapters(self.pool)
        self.scheduler = Scheduler(limits, self.pool, self.adapters if adapters else NoAdapters())
        self.flight: tuple[Plan, list[int]] | None = None
        self.device: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.outcomes: dict[int, object] = {}
        self.plans: list[Plan] = []

    def submit(self, submit: Submit) -> None:
        self.scheduler.submit(submit)
        self.device[submit.sequence_id] = [*submit.prompt, *submit.generated]
        self.tokens[submit.sequence_id] = []

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        launched = (plan, [self.draw(s.sequence.id, s.start + s.rows) for s in plan.sampling])
        if self.flight is not None:
            self.hear(self.scheduler.collect(self.flight[0], self.flight[1], {}))
        self.hear(self.scheduler.take_news())
        self.flight = launched

    def draw(self, sequence_id: int, length: int) -> int:
        tokens = self.device[sequence_id]
        assert len(tokens) == length, "the step's input is not what came before"
        tokens.append(next_token(tokens))
        return tokens[-1]

    def hear(self, news: list[SequenceNews]) -> None:
        for item in news:
            assert item.sequence_id not in self.outcomes, "news after the last"
            self.tokens[item.sequence_id].extend(item.tokens)
            if item.outcome is not None:
                self.outcomes[item.sequence_id] = item.outcome

    def run(self, steps: int = 1000) -> None:
        for _ in range(steps):
            self.step()
            if not self.scheduler.sequences:
                return
        raise AssertionError("sequences are left")

    def assert_empty(self) -> None:
        self.adapters.reclaim(self.pool.total)
        assert self.pool.free_pages == self.pool.total
        assert not any(self.adapters.users.values())


def limits(**changes: int) -> EngineLimits:
    """Small bounds of an engine, with changes."""
    return replace(
        EngineLimits(4, 100, prefill_tokens=16, page_tokens=4, max_context=64), **changes
    )
