"""What the front is told of each sequence: its tokens and, last of all, its outcome. No torch."""

from granatum.runner.engine.scheduling.sequence import Outcome, Sequence
from granatum.runner.records import Failure, SequenceNews, TokenLogprobs


class News:
    """News since the last `take`. Nothing is told of a sequence after its outcome."""

    def __init__(self) -> None:
        self._items: list[SequenceNews] = []

    def take(self) -> list[SequenceNews]:
        """The news, oldest first; they are told once."""
        items, self._items = self._items, []
        return items

    def refuse(self, sequence_id: int, outcome: Outcome) -> None:
        """Tell the outcome of a sequence that was never queued."""
        self._items.append(SequenceNews(sequence_id, outcome=outcome))

    def add_token(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Take in a token that was made, and tell it.

        If a step in flight makes another token, an earlier outcome waits for that token. If this
        token ends the sequence, the end does not wait and the other token is dropped.
        """
        if sequence.cancelled or sequence.told:
            return
        sequence.tokens.append(token)
        end = sequence.finish_of(token)
        sequence.outcome = end or sequence.outcome
        outcome = end if sequence.pending else sequence.outcome
        sequence.told = outcome is not None
        entries = () if logprobs is None else (logprobs,)
        self._items.append(SequenceNews(sequence.id, (token,), entries, outcome))

    def end(self, sequence: Sequence, outcome: Outcome, cause: Failure | None = None) -> None:
        """Tell a sequence's outcome now; tokens that steps in flight make of it are dropped."""
        if not sequence.cancelled and not sequence.told:
            sequence.outcome, sequence.told = outcome, True
            self._items.append(SequenceNews(sequence.id, outcome=outcome, cause=cause))
