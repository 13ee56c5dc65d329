"""Plans as the scheduler makes them, for tests of the shapes of steps."""

from hypothesis import strategies as st

from granatum.runner.engine.scheduling.plan import EngineLimits, Plan, Span
from granatum.runner.engine.scheduling.sequence import Sequence
from granatum.runner.records import Submit

LIMITS = EngineLimits(32, max_waiting=0, prefill_tokens=512, page_tokens=16, max_context=600)
SLOTS = st.integers(-1, 3)


def span(seat: int, slot: int, start: int, rows: int) -> Span:
    tokens = [seat] * (start + rows)
    submit = Submit(seat, tuple(tokens))
    sequence = Sequence(submit, seat, 600, tokens, list(range(38)), seat=seat, slot=slot)
    return Span(sequence, start, rows, samples=True, fed=False)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans as the scheduler makes them: decodes by slot, then chunks, within the limits."""
    slots = sorted(draw(st.lists(SLOTS, max_size=LIMITS.max_batch)))
    decodes = [span(seat, slot, 40, 1) for seat, slot in enumerate(slots)]
    chunks: list[Span] = []
    left = LIMITS.prefill_tokens - len(decodes)
    while left > 1 and len(slots) + len(chunks) < LIMITS.max_batch and draw(st.booleans()):
        rows = draw(st.integers(2, min(left, draw(st.sampled_from((3, 70, 512))) + 2)))
        chunks.append(span(len(slots) + len(chunks), draw(SLOTS), 0, rows))
        left -= rows
    return Plan(tuple(decodes), tuple(chunks))
