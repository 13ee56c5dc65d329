"""Which rows run in the next step, and who may be here at all. No torch.

A step computes spans: one row of every sequence that decodes, and chunks of prompts as far as the
token budget goes. It is planned while the step before still runs, so a sequence may turn out to
have ended one step late: what was computed in vain is dropped, and its pages, seat and adapter are
given back only when no step in flight uses them.

A step that fails is taken back with `abandon`, as if it had not been planned, and pinned on its
sequences with `pin`: those are computed in steps of their own from then on (quarantine.py).
"""

from bisect import insort
from collections.abc import Iterable

from granatum.runner.adapters.residency import Adapters, outcome_of
from granatum.runner.engine.scheduling import failures
from granatum.runner.engine.scheduling.pages import PagePool
from granatum.runner.engine.scheduling.plan import Limits, Plan, Span, launch, span_of
from granatum.runner.engine.scheduling.quarantine import Quarantine
from granatum.runner.engine.scheduling.sequence import Outcome, Sequence
from granatum.runner.records import Departure, Failure, Finish, SequenceNews, Submit, TokenLogprobs

LOOKAHEAD = 8
"""Waiting sequences beyond the free seats whose adapters are brought already."""


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
        self._quarantine = Quarantine()
        self._considered: Sequence | None = None

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
            self.refuse(submit.sequence_id, outcome)
            return
        insort(self.waiting, sequence, key=_rank)
        self._by_id[sequence.id] = sequence
        self._quarantine.admit(sequence.id, submit.suspicion)

    def refuse(self, sequence_id: int, outcome: Outcome) -> None:
        """Say the outcome of a sequence that was not queued."""
        self._news.append(SequenceNews(sequence_id, outcome=outcome))

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
        self._considered = None
        self.adapters.poll()
        kinds = (self._alone, self._company)
        first, second = kinds if self._quarantine.has_turn else kinds[::-1]
        plan = first()
        if not plan.rows:
            plan = second()
        self._quarantine.has_turn = not plan.solo
        return plan

    def _alone(self) -> Plan:
        """A step of one suspect; an empty one if none can run."""
        for sequence in self._quarantine.in_turn(self.running):
            self._considered = sequence
            if sequence.remaining > 1:
                rows = min(sequence.remaining, self.limits.step_tokens)
                return launch([], [span_of(sequence, rows)], solo=True)
            if self._grow(sequence):
                return launch([span_of(sequence, 1)], [], solo=True)
        return Plan()

    def _company(self) -> Plan:
        """A step of all who are under no suspicion."""
        company = self._quarantine.company(self.running)
        active = sorted((s for s in company if s.schedulable), key=_rank)
        decodes = [span_of(s, 1) for s in active if s.remaining == 1 and self._grow(s)]
        chunks: list[Span] = []
        budget = self.limits.step_tokens - len(decodes)
        for sequence in active:
            if sequence.remaining > 1 and budget > 0:
                chunks.append(span_of(sequence, min(sequence.remaining, budget)))
                budget -= chunks[-1].rows
        for sequence in self._admit(budget):
            span = span_of(sequence, min(sequence.remaining, budget))
            (chunks if sequence.remaining > 1 else decodes).append(span)
            budget -= span.rows
        return launch(decodes, chunks)

    def collect(
        self,
        plan: Plan,
        tokens: Iterable[int],
        logprobs: dict[int, TokenLogprobs],
        unsound: frozenset[int] = frozenset(),
    ) -> list[SequenceNews]:
        """Take in a step's `tokens`, one per sampling span; `logprobs` by sequence id.

        `unsound`: ids of sequences whose logits are not finite; their tokens mean nothing.
        """
        drawn = iter(tokens)
        if plan.solo:
            self._quarantine.acquit(plan.spans[0].sequence.id)
        for span in plan.spans:
            sequence = span.sequence
            sequence.in_flight -= 1
            if span.samples:
                sequence.pending -= 1
                token = next(drawn)
                if unsound and sequence.id in unsound:
                    made = len(sequence.tokens) - len(sequence.submit.prompt)
                    self._end(sequence, failures.not_finite(sequence.submit, made))
                else:
                    self._append(sequence, token, logprobs.get(sequence.id))
            self._leave_if_idle(sequence)
        return self.take_news()

    def abandon(self, plan: Plan) -> None:
        """Take back a step that brought nothing; no later step may be in flight with its tokens."""
        for span in plan.spans:
            sequence = span.sequence
            sequence.computed -= span.rows
            sequence.in_flight -= 1
            sequence.pending -= span.samples
            if sequence.outcome is not None and not sequence.pending:
                self._end(sequence, sequence.outcome)  # the token that it waited for never comes
            self._leave_if_idle(sequence)

    def pin(self, plan: Plan) -> None:
        """Have the sequences of a failed step answer for it: one alone ends, several are tried."""
        for span in plan.spans:
            sequence = span.sequence
            if plan.solo:
                self._fail(sequence)
            elif sequence.id in self._by_id:
                self._quarantine.suspect(sequence.id)

    def pin_considered(self) -> bool:
        """End the sequence at which `schedule` failed; False if it was at none."""
        if self._considered is None:
            return False
        self._fail(self._considered)
        return True

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
            return failures.prompt_length(prompt, self.limits.max_context - 1)
        if (largest := max(sequence.tokens)) >= self.limits.vocabulary:
            return failures.token_out_of_vocabulary(largest, self.limits.vocabulary)
        if self.limits.pages_for(len(sequence.tokens)) > self.pool.total:
            return self._too_large(sequence)
        if len(sequence.tokens) >= sequence.limit:
            return Finish.LENGTH
        if self.draining or self.sequences >= self.limits.max_batch + self.limits.max_waiting:
            return Departure.REFUSED
        return None

    def _too_large(self, sequence: Sequence) -> Failure:
        return failures.too_large(len(sequence.tokens), self.pool.total, self.limits.page_tokens)

    def _admit(self, budget: int) -> list[Sequence]:
        """Move waiting sequences into the batch, and bring the adapters of those that come next.

        Returned are those that may run in company, while the budget lasts.
        """
        admitted: list[Sequence] = []
        is_open = budget > 0
        for sequence in self.waiting[: len(self._seats) + LOOKAHEAD]:
            self._considered = sequence
            slot = self._acquire(sequence)
            if slot is None:
                continue
            is_open = is_open and budget > 0 and bool(self._seats) and self._take_pages(sequence)
            if is_open:
                sequence.slot, sequence.seat = slot, self._seats.pop()
                self.running.append(sequence)
                self.waiting.remove(sequence)
                if sequence.id not in self._quarantine:
                    budget -= sequence.remaining
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
        self._considered = sequence
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
        if sequence.cancelled or sequence.told:
            return
        sequence.tokens.append(token)
        end = sequence.finish_of(token)
        sequence.outcome = end or sequence.outcome
        says = end if sequence.pending else sequence.outcome
        sequence.told = says is not None
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
            self._end(sequence, outcome, cause)
        self._leave_if_idle(sequence)

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence with which a step failed, at once."""
        self._end(sequence, failures.STEP_FAILED)
        self._leave_if_idle(sequence)

    def _end(self, sequence: Sequence, outcome: Outcome, cause: Failure | None = None) -> None:
        """Say a sequence's outcome now; what steps in flight bring of it is dropped."""
        if not sequence.cancelled and not sequence.told:
            sequence.outcome, sequence.told = outcome, True
            self._news.append(SequenceNews(sequence.id, outcome=outcome, cause=cause))

    def _leave_if_idle(self, sequence: Sequence) -> None:
        """Give back all that an ended sequence holds, once no step uses it."""
        over = sequence.cancelled or sequence.outcome is not None
        if not over or sequence.in_flight or self._by_id.pop(sequence.id, None) is None:
            return
        self._quarantine.forget(sequence.id)
        if sequence.seat is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.pool.free(sequence.pages)
        self._seats.append(sequence.seat)
        self._release(sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
