"""The rows of a step, and the bounds of the engine that computes them. No torch."""

from dataclasses import dataclass

from granatum.runner.engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of one engine."""

    max_batch: int
    """Sequences that run at a time."""
    max_waiting: int
    """Sequences that wait beside the running ones; more are refused."""
    prefill_tokens: int
    """Rows of one step, decodes and chunks of prompts together."""
    page_tokens: int
    max_context: int
    """Tokens of a sequence, prompt and output."""
    vocabulary: int = 1 << 31
    """Every token id is below this number."""

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
    """Whether the step before sampled its token, so that only the device knows the token yet."""

    @property
    def made(self) -> int:
        """Of a span that makes a token: how many tokens the sequence made before."""
        return self.start + self.rows - len(self.sequence.submit.prompt)

    @property
    def forced(self) -> int | None:
        """The token that is taken whatever is drawn; None if the drawn one is."""
        given = self.sequence.submit.forced
        return given[self.made] if self.made < len(given) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: decodes of one row each, ordered by adapter slot, and chunks of prompts."""

    decodes: tuple[Span, ...] = ()
    chunks: tuple[Span, ...] = ()
    solo: bool = False
    """Whether it is a suspect's step, which shares the device with no other step."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """Decodes and chunks, in the order of their rows."""
        return self.decodes + self.chunks

    @property
    def sampling(self) -> tuple[Span, ...]:
        """The spans that make a token, in the order of their rows."""
        return tuple(span for span in self.spans if span.samples)

    @property
    def lora(self) -> bool:
        """Whether any row has an adapter."""
        return any(span.sequence.slot >= 0 for span in self.spans)

    @property
    def rows(self) -> int:
        """Rows of all spans."""
        return len(self.decodes) + sum(span.rows for span in self.chunks)


def span_of(sequence: Sequence, rows: int) -> Span:
    """The sequence's next `rows` tokens."""
    last = rows == sequence.remaining
    fed = sequence.computed + rows > len(sequence.tokens)
    return Span(sequence, sequence.computed, rows, last, fed)


def launch(decodes: list[Span], chunks: list[Span], *, solo: bool = False) -> Plan:
    """The plan of these spans, which count as in flight from now on.

    Sequences that were sent away while the step was planned are left out.
    """
    stay = sorted((s for s in decodes if s.sequence.schedulable), key=lambda s: s.sequence.slot)
    plan = Plan(tuple(stay), tuple(s for s in chunks if s.sequence.schedulable), solo)
    for span in plan.spans:
        span.sequence.computed += span.rows
        span.sequence.in_flight += 1
        span.sequence.pending += span.samples
    return plan
