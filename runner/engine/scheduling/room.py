"""What sequences hold: pages, seats and adapters. No torch."""

from granatum.runner.adapters.residency import Adapters
from granatum.runner.engine.scheduling import failures
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.engine.scheduling.sequence import Outcome, Sequence
from granatum.runner.pages import PagePool
from granatum.runner.records import Departure, Failure, Finish


class Room:
    """The engine's pages, seats and adapters, and who has them.

    A seat is a row of the tables that live on the device from step to step, such as the last
    token of each running sequence. Idle adapters give their pages to sequences.
    """

    def __init__(self, limits: EngineLimits, pool: PagePool, adapters: Adapters) -> None:
        self.adapters = adapters
        self._limits = limits
        self._pool = pool
        self._seats = list(range(limits.max_batch - 1, -1, -1))

    @property
    def free_seats(self) -> int:
        """Sequences that may still enter the batch."""
        return len(self._seats)

    def verdict(self, sequence: Sequence, *, full: bool) -> Outcome | None:
        """Why a new sequence does not even wait; None if it does.

        `full`: the engine takes no further sequence now. If `generated` already ends the sequence,
        the sequence gets that end even when `full`.
        """
        limits, tokens = self._limits, sequence.tokens
        if sequence.submit.generated and (end := sequence.finish_of(tokens[-1])):
            return end
        prompt = len(sequence.submit.prompt)
        if not 0 < prompt < limits.max_context:
            return failures.prompt_length(prompt, limits.max_context - 1)
        if (largest := max(tokens)) >= limits.vocabulary:
            return failures.token_out_of_vocabulary(largest, limits.vocabulary)
        if limits.pages_for(len(tokens)) > self._pool.total:
            return self.too_large(sequence)
        if len(tokens) >= sequence.limit:
            return Finish.LENGTH
        return Departure.REFUSED if full else None

    def can_fit(self, sequence: Sequence, tokens: int) -> bool:
        """Whether `tokens` tokens and the sequence's adapter fit if all pages are theirs."""
        adapter = sequence.submit.adapter
        pages = 0 if adapter is None else self.adapters.pages_of(adapter)
        return self._limits.pages_for(tokens) + pages <= self._pool.total

    def too_large(self, sequence: Sequence) -> Failure:
        """The error of a sequence that can never fit."""
        return failures.too_large(len(sequence.tokens), self._pool.total, self._limits.page_tokens)

    def acquire_adapter(self, sequence: Sequence) -> int | None:
        """The slot of the sequence's adapter, -1 for the base model, None while it is brought.

        Raises the error for which the adapter cannot be loaded.
        """
        adapter = sequence.submit.adapter
        return -1 if adapter is None else self.adapters.acquire(adapter)

    def release_adapter(self, sequence: Sequence) -> None:
        """The sequence's adapter has one user less."""
        if sequence.submit.adapter is not None:
            self.adapters.release(sequence.submit.adapter)

    def enter(self, sequence: Sequence, slot: int, running: int) -> bool:
        """Give the sequence a seat, and pages for all its tokens; its adapter is in `slot`.

        False, and nothing taken, if that would not leave one page for each of the `running`
        sequences to grow into.
        """
        if not self._seats:
            return False
        need = self._limits.pages_for(len(sequence.tokens))
        missing = need + running - self._pool.free_pages
        if missing > 0 and self.adapters.reclaim(missing) < missing:
            return False
        pages = self._pool.allocate(need)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        sequence.slot, sequence.seat = slot, self._seats.pop()
        return True

    def has_next(self, sequence: Sequence) -> bool:
        """Whether the sequence's pages have room for the KV of its next token."""
        return sequence.computed < len(sequence.pages) * self._limits.page_tokens

    def grow(self, sequence: Sequence) -> bool:
        """Give the sequence one more page, if need be of idle adapters; False if there is none."""
        page = self._pool.allocate(1)
        if page is None and self.adapters.reclaim(1):
            page = self._pool.allocate(1)
        sequence.pages.extend(page or ())
        return page is not None

    def leave(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds that has a seat."""
        assert sequence.seat is not None
        self._pool.free(sequence.pages)
        self._seats.append(sequence.seat)
        self.release_adapter(sequence)
