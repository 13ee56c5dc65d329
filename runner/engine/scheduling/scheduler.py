"""Which rows run in the next step. No torch.

A step computes spans: one row of every sequence that decodes, and chunks of prompts, up to
`prefill_tokens` rows in all. A step is planned while the step before still runs, so the scheduler
may learn one step late that a sequence has ended. It drops the token that was computed in vain. It
takes pages, seat and adapter back only when no step in flight uses them.

`abandon` takes back a step that failed, as if it had not been planned. `pin` then has the step's
sequences answer for it: they are computed in steps of their own from then on (quarantine.py).
"""

from bisect import insort
from collections.abc import Iterable

from granatum.runner.adapters.residency import Adapters, outcome_of
from granatum.runner.engine.scheduling import failures
from granatum.runner.engine.scheduling.news import News
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan, Span, launch, span_of
from granatum.runner.engine.scheduling.quarantine import Quarantine
from granatum.runner.engine.scheduling.room import Room
from granatum.runner.engine.scheduling.sequence import Outcome, Sequence
from granatum.runner.pages import PagePool
from granatum.runner.records import Departure, Failure, SequenceNews, Submit, TokenLogprobs

LOOKAHEAD = 8
"""How many waiting sequences beyond the free seats get their adapters brought early."""


class Scheduler:
    """Sequences that wait and run, and the order of their turns.

    They run within `limits`, with pages of `pool` and adapters of `adapters`.
    """

    def __init__(self, limits: EngineLimits, pool: PagePool, adapters: Adapters) -> None:
        self._limits = limits
        self._adapters = adapters
        self._room = Room(limits, pool, adapters)
        self._news = News()
        self._quarantine = Quarantine()
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        self._arrivals = 0
        self._draining = False
        self._considered: Sequence | None = None

    @property
    def sequences(self) -> int:
        """Sequences running or waiting."""
        return len(self._by_id)

    def submit(self, submit: Submit) -> None:
        """Queue a sequence, or answer at once if it cannot run or has nothing left to do."""
        prompt = len(submit.prompt)
        limit = min(prompt + submit.max_tokens, self._limits.max_context)
        tokens = [*submit.prompt, *submit.generated]
        sequence = Sequence(submit, self._arrivals, limit, tokens)
        self._arrivals += 1
        most = self._limits.max_batch + self._limits.max_waiting
        full = self._draining or self.sequences >= most
        outcome = self._room.verdict(sequence, full=full)
        if outcome is not None:
            self.refuse(submit.sequence_id, outcome)
            return
        insort(self._waiting, sequence, key=_rank)
        self._by_id[sequence.id] = sequence
        self._quarantine.admit(sequence.id, submit.suspicion)

    def refuse(self, sequence_id: int, outcome: Outcome) -> None:
        """Tell the outcome of a sequence that was not queued."""
        self._news.refuse(sequence_id, outcome)

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence; nothing more is said of it."""
        sequence = self._by_id.get(sequence_id)
        if sequence is not None:
            sequence.cancelled = True
            self._leave_if_idle(sequence)

    def set_draining(self, draining: bool) -> None:
        """Begin to give everything back and refuse what comes, or stop doing so."""
        self._draining = draining
        if draining:
            for sequence in tuple(self._by_id.values()):
                self._depart(sequence, Departure.DRAINED)

    def schedule(self) -> Plan:
        """The next step. Its spans count as in flight from now on."""
        self._considered = None
        self._adapters.poll()
        kinds = (self._alone, self._company)
        first, second = kinds if self._quarantine.has_turn else kinds[::-1]
        plan = first()
        if not plan.rows:
            plan = second()
        self._quarantine.has_turn = not plan.solo
        return plan

    def _alone(self) -> Plan:
        """A step of one suspect; an empty one if none can run."""
        for sequence in self._quarantine.in_turn(self._running):
            self._considered = sequence
            if sequence.remaining > 1:
                rows = min(sequence.remaining, self._limits.prefill_tokens)
                return launch([], [span_of(sequence, rows)], solo=True)
            if self._grow(sequence):
                return launch([span_of(sequence, 1)], [], solo=True)
        return Plan()

    def _company(self) -> Plan:
        """A step of all who are under no suspicion."""
        company = self._quarantine.company(self._running)
        active = sorted((s for s in company if s.schedulable), key=_rank)
        decodes = [span_of(s, 1) for s in active if s.remaining == 1 and self._grow(s)]
        chunks: list[Span] = []
        budget = self._limits.prefill_tokens - len(decodes)
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

        `unsound`: ids of sequences with logits that are not finite; their tokens mean nothing.
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
                    self._news.end(sequence, failures.not_finite(sequence.submit, made))
                else:
                    self._news.add_token(sequence, token, logprobs.get(sequence.id))
            self._leave_if_idle(sequence)
        return self._news.take()

    def abandon(self, plan: Plan) -> None:
        """Take back a step that gave no results.

        No step in flight may have been fed with its tokens.
        """
        for span in plan.spans:
            sequence = span.sequence
            sequence.computed -= span.rows
            sequence.in_flight -= 1
            sequence.pending -= span.samples
            if sequence.outcome is not None and not sequence.pending:
                # The token that the outcome waited for never comes.
                self._news.end(sequence, sequence.outcome)
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
        """What there is to tell since the last time."""
        return self._news.take()

    def _admit(self, budget: int) -> list[Sequence]:
        """Move waiting sequences into the batch, and bring the adapters of those that come next.

        Returns the admitted sequences that are not suspects.
        """
        admitted: list[Sequence] = []
        is_open = budget > 0
        for sequence in self._waiting[: self._room.free_seats + LOOKAHEAD]:
            self._considered = sequence
            slot = self._acquire(sequence)
            if slot is None:
                continue
            is_open = is_open and budget > 0
            is_open = is_open and self._room.enter(sequence, slot, len(self._running))
            if is_open:
                self._running.append(sequence)
                self._waiting.remove(sequence)
                if sequence.id not in self._quarantine:
                    budget -= sequence.remaining
                    admitted.append(sequence)
                continue
            self._room.release_adapter(sequence)
            if not self._running:
                break  # earlier requests need the pages that later ones would ask for
        return admitted

    def _acquire(self, sequence: Sequence) -> int | None:
        """The slot of the sequence's adapter; None while that is brought, or if it failed."""
        try:
            slot = self._room.acquire_adapter(sequence)
        except Exception as error:  # a bad adapter ends its own sequences, not the engine
            self._depart(sequence, *outcome_of(error))
            return None
        if slot is None or slot < 0 or self._room.can_fit(sequence, len(sequence.tokens)):
            return slot
        self._room.release_adapter(sequence)
        self._depart(sequence, self._room.too_large(sequence))
        return None

    def _grow(self, sequence: Sequence) -> bool:
        """Have room for the sequence's next token; False if it cannot run in this step.

        Idle adapters give way first, then the newest sequence.
        """
        self._considered = sequence
        if self._room.has_next(sequence):
            return sequence.schedulable
        while sequence.schedulable:
            if self._room.grow(sequence):
                return True
            if any(not s.schedulable for s in self._running):
                return False  # pages come back when the step in flight is collected
            self._make_room(sequence)
        return False

    def _make_room(self, sequence: Sequence) -> None:
        """Send the newest sequence away so that `sequence` can grow, or itself if it never can."""
        if self._room.can_fit(sequence, sequence.computed + 1):
            newest = max((s for s in self._running if s.schedulable), key=_rank)
            self._depart(newest, Departure.EVICTED)
        else:
            self._depart(sequence, self._room.too_large(sequence))

    def _depart(
        self, sequence: Sequence, outcome: Departure | Failure, cause: Failure | None = None
    ) -> None:
        """End a sequence early.

        If a step in flight makes its next token, the outcome is told with that token.
        """
        if sequence.outcome is not None or sequence.cancelled:
            return
        sequence.outcome = outcome
        if not sequence.pending:
            self._news.end(sequence, outcome, cause)
        self._leave_if_idle(sequence)

    def _fail(self, sequence: Sequence) -> None:
        """End a sequence with which a step failed, at once."""
        self._news.end(sequence, failures.STEP_FAILED)
        self._leave_if_idle(sequence)

    def _leave_if_idle(self, sequence: Sequence) -> None:
        """Take back all that an ended sequence holds, once no step uses it."""
        over = sequence.cancelled or sequence.outcome is not None
        if not over or sequence.in_flight or self._by_id.pop(sequence.id, None) is None:
            return
        self._quarantine.forget(sequence.id)
        if sequence.seat is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._room.leave(sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
