"""A real engine with random weights in this process, and users who drive it."""

import heapq
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from adapter_images import digest_of
from latencies import Record
from traffic import Request, Users

from granatum.runner.engine.engine import Engine
from granatum.runner.engine.process import POLL_S, SWITCH_S, EngineOptions, OpenSource, build_engine
from granatum.runner.records import Departure, Failure, SequenceNews, Submit


@dataclass(frozen=True, slots=True)
class EngineSize:
    """How large an engine is to be; None: the engine's own default."""

    device: str
    batch: int
    rank: int
    adapters: int
    """On the device at a time."""
    host_cache_bytes: int
    arena_bytes: int | None = None
    prefill_tokens: int = 512


def start_engine(
    model: Path, size: EngineSize, source: OpenSource, *, all_graphs: bool = True
) -> Engine:
    """An engine as the runner builds it, but for its weights.

    `all_graphs`: capture all graphs now. An engine that serves captures most of them between steps.
    """
    options = EngineOptions(
        model,
        size.device,
        max_batch=size.batch,
        max_waiting=1 << 20,
        prefill_tokens=size.prefill_tokens,
        max_rank=size.rank,
        adapter_slots=size.adapters,
        host_cache_bytes=size.host_cache_bytes,
        arena_bytes=size.arena_bytes,
        random_weights=True,
    )
    engine = build_engine(options, source)
    sys.setswitchinterval(SWITCH_S)
    if all_graphs:
        capture_all(engine)
    return engine


def capture_all(engine: Engine) -> None:
    """Capture the graphs that an idle engine has still to capture."""
    while engine.graph_due:
        engine.capture()


@dataclass(slots=True)
class _Running:
    record: Record
    prompt: tuple[int, ...]
    made: list[int] = field(default_factory=list)


class EngineUsers:
    """Users of one engine; `vocab` bounds their prompts' tokens."""

    def __init__(self, engine: Engine, vocab: int) -> None:
        self._engine = engine
        self._vocab = vocab
        self._rng = np.random.default_rng(0)
        self._last_id = 0

    def drive(self, users: Users, seconds: float | None = None) -> list[Record]:
        """Step until everybody has what they asked for, or until the time is over."""
        self._users = users
        self._running: dict[int, _Running] = {}
        self._records: list[Record] = []
        self._due = [(user[0].arrival, number, 0) for number, user in enumerate(users)]
        heapq.heapify(self._due)
        self._begun = time.monotonic()
        while self._due or self._running:
            if seconds is not None and time.monotonic() - self._begun > seconds:
                self._end()
                break
            self._send_due()
            self._step()
        return self._records

    def touch(self, adapters: Sequence[int | None]) -> None:
        """Bring adapters onto the device, one token each; of too many, the last stay."""
        self.drive(tuple((Request(8, 1, adapter),) for adapter in adapters))

    def _step(self) -> None:
        engine = self._engine
        if engine.graph_due:
            engine.capture()
        news = engine.step() if engine.busy else []
        now = time.monotonic()
        for item in news:
            self._take(item, now)
        if not engine.in_flight and not news:  # adapters are on their way, or nobody is here
            wait = self._due[0][0] - (now - self._begun) if self._due else POLL_S
            time.sleep(min(max(wait, 0.0), POLL_S))

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now - self._begun:
            arrival, number, index = heapq.heappop(self._due)
            request = self._users[number][index]
            record = Record(number, index, request, max(now, self._begun + arrival))
            self._records.append(record)
            prompt = tuple(self._rng.integers(3, self._vocab, request.prompt).tolist())
            self._submit(_Running(record, prompt))

    def _submit(self, running: _Running) -> None:
        self._last_id += 1
        self._running[self._last_id] = running
        request = running.record.request
        adapter = None if request.adapter is None else digest_of(request.adapter)
        self._engine.submit(
            Submit(
                self._last_id,
                running.prompt,
                tuple(running.made),
                adapter=adapter,
                max_tokens=request.output,
            )
        )

    def _take(self, news: SequenceNews, now: float) -> None:
        running = self._running[news.sequence_id]
        running.made += news.tokens
        running.record.times += [now] * len(news.tokens)
        if news.outcome is None:
            return
        del self._running[news.sequence_id]
        assert not isinstance(news.outcome, Failure), news.outcome.message
        if isinstance(news.outcome, Departure):  # as the router does
            self._submit(running)
            return
        number, following = running.record.user, running.record.index + 1
        if following < len(self._users[number]):
            arrival = max(self._users[number][following].arrival, now - self._begun)
            heapq.heappush(self._due, (arrival, number, following))

    def _end(self) -> None:
        for sequence_id in self._running:
            self._engine.cancel(sequence_id)
        while self._engine.busy:
            self._engine.step()
