"""Which rows run in the next step, and who may be here at all. No torch.

A step computes spans: one row of every sequence that decodes, and chunks of prompts as far as the
token budget goes. It is planned while the step before still runs, so a sequence may turn out to
have ended one step late: what was computed in vain is dropped, and its pages, seat and adapter are
given back only when no step in flight uses them.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from granatum.runner.adapters import Adapters, outcome_of
from granatum.runner.pages import PagePool
from granatum.runner.records import Departure, Failure, Finish, SequenceNews, Submit, TokenLogprobs
from granatum.runner.sequence import Outcome, Sequence

INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8  # google.rpc.Code
LOOKAHEAD = 8
"""Waiting sequences beyond the free seats whose adapters are brought already."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one engine."""

    max_batch: int
    """Sequences that run at a time."""
    max_waiting: int
    """Sequences beyond those; more are refused."""
    step_tokens: int
    """Rows of one step, those of decodes included."""
    page_tokens: int
    max_context: int
    """Tokens of a sequence, prompt and output."""

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence in a step: tokens start .. start + rows - 1."""

    sequence: Sequence
    start: int
    rows: int
    samples: bool
    """Whether the last row's logits make the sequence's next token."""
    fed: bool
    """Whether its token was sampled by the step before and is known to the device alone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: decodes are one row each, ordered by adapter slot; chunks are prompts' parts."""

    decodes: tuple[Span, ...] = ()
    chunks: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """All of them, in the order of their rows."""
        return self.decodes + self.chunks

    @property
    def sampling(self) -> tuple[Span, ...]:
        """Those that make a token, in the order of their rows."""
        return tuple(span for span in self.spans if span.samples)

    @property
    def lora(self) -> bool:
        """Whether any row has an adapter."""
        return any(span.sequence.slot >= 0 for span in self.spans)

    @property
    def rows(self) -> int:
        """Rows of all spans."""
        return len(self.decodes) + sum(span.rows for span in self.chunks)


class Scheduler:
    """Sequences waiting and running, and the pages and seats they hold.

    A seat is a row of the tables that live on the device from step to step, such as the last
    token of each running sequence.
    """

    def __init__(self, limits: Limits, pool: PagePool, adapters: Adapters) -> None:
        self.limits = limits
        self.pool = pool
        self.adapters = adapters
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.draining = False
        self._by_id: dict[int, Sequence] = {}
        self._seats = list(range(limits.max_batch - 1, -1, -1))
        self._arrivals = 0
        self._news: list[SequenceNews] = []

    @property
    def sequences(self) -> int:
        """Sequences running or waiting."""
        return len(self._by_id)

    def submit(self, submit: Submit) -> None:
        """Queue a sequence, or answer at once if it cannot run or has nothing left to do."""
        prompt = len(submit.prompt)
        limit = min(prompt + submit.max_tokens, self.limits.max_context)
        tokens = [*submit.prompt, *submit.generated]
        sequence = Sequence(submit, self._arrivals, limit, tokens)
        self._arrivals += 1
        outcome = self._verdict(sequence)
        if outcome is not None:
            self._news.append(SequenceNews(submit.sequence_id, outcome=outcome))
            return
        self._by_id[sequence.id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence; nothing more is said of it."""
        sequence = self._by_id.get(sequence_id)
        if sequence is not None:
            sequence.cancelled = True
            self._leave_if_idle(sequence)

    def set_draining(self, draining: bool) -> None:
        """Begin to give everything back and refuse what comes, or stop doing so."""
        self.draining = draining
        if draining:
            for sequence in tuple(self._by_id.values()):
                self._depart(sequence, Departure.DRAINED)

    def schedule(self) -> Plan:
        """The next step, whose spans count as in flight from now on."""
        self.adapters.poll()
        active = sorted((s for s in self.running if s.schedulable), key=_rank)
        decodes = [_span(s, 1) for s in active if s.remaining == 1 and self._grow(s)]
        chunks: list[Span] = []
        budget = self.limits.step_tokens - len(decodes)
        for sequence in active:
            if sequence.remaining > 1 and budget > 0:
                chunks.append(_span(sequence, min(sequence.remaining, budget)))
                budget -= chunks[-1].rows
        for sequence in self._admit(budget):
            span = _span(sequence, min(sequence.remaining, budget))
            (chunks if sequence.remaining > 1 else decodes).append(span)
            budget -= span.rows
        return _launch(decodes, chunks)

    def collect(
        self, plan: Plan, tokens: Iterable[int], logprobs: dict[int, TokenLogprobs]
    ) -> list[SequenceNews]:
        """Take in a step's `tokens`, one per sampling span; `logprobs` by sequence id."""
        drawn = iter(tokens)
        for span in plan.spans:
            sequence = span.sequence
            sequence.in_flight -= 1
            if span.samples:
                sequence.pending -= 1
                self._append(sequence, next(drawn), logprobs.get(sequence.id))
            self._leave_if_idle(sequence)
        return self.take_news()

    def take_news(self) -> list[SequenceNews]:
        """What there is to say since the last time."""
        news, self._news = self._news, []
        return news

    def _verdict(self, sequence: Sequence) -> Outcome | None:
        """Why a new sequence does not even wait; None if it does."""
        if sequence.submit.generated and (end := sequence.finish_of(sequence.tokens[-1])):
            return end  # its outcome was lost on the way; that needs no room, draining or not
        prompt = len(sequence.submit.prompt)
        if not 0 < prompt < self.limits.max_context:
            return Failure(
                INVALID_ARGUMENT,
                f"the prompt has {prompt} tokens and must have 1 to {self.limits.max_context - 1}: "
                "shorten it",
                "PROMPT_LENGTH",
            )
        if self.limits.pages_for(len(sequence.tokens)) > self.pool.total:
            return self._too_large(sequence)
        if len(sequence.tokens) >= sequence.limit:
            return Finish.LENGTH
        if self.draining or self.sequences >= self.limits.max_batch + self.limits.max_waiting:
            return Departure.REFUSED
        return None

    def _too_large(self, sequence: Sequence) -> Failure:
        return Failure(
            RESOURCE_EXHAUSTED,
            f"{len(sequence.tokens)} tokens with their adapter do not fit into this runner's "
            f"{self.pool.total} pages of {self.limits.page_tokens} tokens: shorten the request, "
            "or give the runner more memory",
            "SEQUENCE_TOO_LARGE",
        )

    def _admit(self, budget: int) -> list[Sequence]:
        """Move waiting sequences into the batch, and bring the adapters of those that come next."""
        admitted: list[Sequence] = []
        is_open = budget > 0
        for sequence in self.waiting[: len(self._seats) + LOOKAHEAD]:
            slot = self._acquire(sequence)
            if slot is None:
                continue
            is_open = is_open and budget > 0 and bool(self._seats) and self._take_pages(sequence)
            if is_open:
                sequence.slot, sequence.seat = slot, self._seats.pop()
                budget -= sequence.remaining
                self.running.append(sequence)
                self.waiting.remove(sequence)
                admitted.append(sequence)
                continue
            self._release(sequence)
            if not self.running:
                break  # it has what others asked for before; they may not ask for more
        return admitted

    def _acquire(self, sequence: Sequence) -> int | None:
        """The slot of its adapter, -1 without one; None while that is brought, or if it failed."""
        if sequence.submit.adapter is None:
            return -1
        try:
            slot = self.adapters.acquire(sequence.submit.adapter)
        except Exception as error:  # a bad adapter ends its own sequences, not the engine
            self._depart(sequence, *outcome_of(error))
            return None
        if slot is not None and not self._can_fit(sequence, len(sequence.tokens)):
            self._release(sequence)
            self._depart(sequence, self._too_large(sequence))
            return None
        return slot

    def _release(self, sequence: Sequence) -> None:
        if sequence.submit.adapter is not None:
            self.adapters.release(sequence.submit.adapter)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Pages for all its tokens, if that leaves one for each running sequence to grow into."""
        need = self.limits.pages_for(len(sequence.tokens))
        spare = len(self.running)
        missing = need + spare - self.pool.free_pages
        if missing > 0 and self.adapters.reclaim(missing) < missing:
            return False
        pages = self.pool.allocate(need)
        sequence.pages.extend(pages or ())
        return pages is not None

    def _grow(self, sequence: Sequence) -> bool:
        """A page for its next token; under pressure from idle adapters, then from the newest."""
        if sequence.computed < len(sequence.pages) * self.limits.page_tokens:
            return sequence.schedulable
        while sequence.schedulable:
            page = self.pool.allocate(1)
            if page is None and self.adapters.reclaim(1):
                page = self.pool.allocate(1)
            if page is not None:
                sequence.pages.extend(page)
                return True
            if any(not s.schedulable for s in self.running):
                return False  # pages come back when the step in flight is collected
            self._make_room(sequence)
        return False

    def _make_room(self, sequence: Sequence) -> None:
        """Send the newest away so that `sequence` can grow, or itself if it never can."""
        if self._can_fit(sequence, sequence.computed + 1):
            newest = max((s for s in self.running if s.schedulable), key=_rank)
            self._depart(newest, Departure.EVICTED)
        else:
            self._depart(sequence, self._too_large(sequence))

    def _can_fit(self, sequence: Sequence, tokens: int) -> bool:
        """Whether so many tokens and the adapter fit when they have everything to themselves."""
        adapter = sequence.submit.adapter
        pages = 0 if adapter is None else self.adapters.pages_of(adapter)
        return self.limits.pages_for(tokens) + pages <= self.pool.total

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        if sequence.cancelled or isinstance(sequence.outcome, Finish):
            return
        sequence.tokens.append(token)
        end = sequence.finish_of(token)
        sequence.outcome = end or sequence.outcome
        says = end if sequence.pending else sequence.outcome
        entries = () if logprobs is None else (logprobs,)
        self._news.append(SequenceNews(sequence.id, (token,), entries, says))

    def _depart(
        self, sequence: Sequence, outcome: Departure | Failure, cause: Failure | None = None
    ) -> None:
        """End a sequence early; if a step in flight makes a token of it, with that token."""
        if sequence.outcome is not None or sequence.cancelled:
            return
        sequence.outcome = outcome
        if not sequence.pending:
            self._news.append(SequenceNews(sequence.id, outcome=outcome, cause=cause))
        self._leave_if_idle(sequence)

    def _leave_if_idle(self, sequence: Sequence) -> None:
        """Give back all that an ended sequence holds, once no step uses it."""
        over = sequence.cancelled or sequence.outcome is not None
        if not over or sequence.in_flight or self._by_id.pop(sequence.id, None) is None:
            return
        if sequence.seat is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.pool.free(sequence.pages)
        self._seats.append(sequence.seat)
        self._release(sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _span(sequence: Sequence, rows: int) -> Span:
    last = rows == sequence.remaining
    fed = sequence.computed + rows > len(sequence.tokens)
    return Span(sequence, sequence.computed, rows, last, fed)


def _launch(decodes: list[Span], chunks: list[Span]) -> Plan:
    """The plan without those sent away while it was made; the rest are in flight."""
    stay = sorted((s for s in decodes if s.sequence.schedulable), key=lambda s: s.sequence.slot)
    plan = Plan(tuple(stay), tuple(s for s in chunks if s.sequence.schedulable))
    for span in plan.spans:
        span.sequence.computed += span.rows
        span.sequence.in_flight += 1
        span.sequence.pending += span.samples
    return plan
