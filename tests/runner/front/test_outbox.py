"""What waits for a router, against a plain list of what was added."""

from hypothesis import given
from hypothesis import strategies as st

from granatum.runner.front.outbox import MESSAGE_BYTES, PART_BYTES, Outbox
from granatum.v1.inference_pb2 import FINISH_REASON_STOP, Token, TokenIds
from granatum.v1.runner_pb2 import SequenceOutput
from granatum.v1.transport import MAX_MESSAGE_BYTES


def texts(outbox: Outbox) -> dict[int, list[str]]:
    """By sequence, all that is in it."""
    told: dict[int, list[str]] = {}
    while outbox:
        for output in outbox.take().outputs:
            told.setdefault(output.sequence_id, []).extend(token.text for token in output.tokens)
    return told


def test_what_is_not_taken_is_merged() -> None:
    outbox = Outbox()
    outbox.add(1, [Token(text="a")], 3)
    outbox.add(2, [Token(text="x")], 5)
    outbox.add(1, [Token(text="b")], 0)
    one, other = outbox.take().outputs
    assert [token.text for token in one.tokens] == ["a", "b"]
    assert (one.prompt_tokens, other.prompt_tokens) == (3, 5)
    assert not outbox


def test_messages_stay_far_below_the_limit_and_lose_nothing() -> None:
    outbox = Outbox()
    big = [Token(text=f"{i:06}" * 100) for i in range(60_000)]
    outbox.add(1, big, 3).finished = FINISH_REASON_STOP
    outbox.add(2, [Token(text="small")], 1)
    assert outbox.size > 30 << 20
    heard: list[str] = []
    outcomes: list[int] = []
    while outbox:
        message = outbox.take()
        assert message.ByteSize() < MAX_MESSAGE_BYTES / 4
        assert message.ByteSize() < MESSAGE_BYTES + 2 * PART_BYTES
        for output in message.outputs:
            if output.sequence_id == 1:
                assert not outcomes, "news after the last"
                heard += [token.text for token in output.tokens]
                outcomes += [output.finished] if output.finished else []
    assert heard == [token.text for token in big]
    assert outcomes == [FINISH_REASON_STOP]
    assert outbox.size == 0


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), max_size=30), st.integers(1, 4))
def test_discarded_sequence_leaves_the_others(adds: list[tuple[int, int]], gone: int) -> None:
    outbox, kept = Outbox(), dict[int, list[str]]()
    for at, (number, count) in enumerate(adds):
        tokens = [Token(text=f"{at}" * PART_BYTES) for _ in range(count)]
        outbox.add(number, tokens, 0)
        if number != gone:
            kept.setdefault(number, []).extend(token.text for token in tokens)
    outbox.discard(gone)
    assert texts(outbox) == kept
    assert outbox.size == 0


def test_a_prompt_counts_by_its_bytes_and_goes_out_once() -> None:
    outbox = Outbox()
    prompt = TokenIds(ids=range(100_000, 600_000))
    for sequence in (1, 2):
        outbox.add(sequence, [Token(id=7)], 500_000, prompt)
    assert outbox.size > 2 * prompt.ByteSize()
    outbox.discard(2)
    outbox.add(3, [Token(id=8)], 500_000, prompt)
    told: list[SequenceOutput] = []
    while outbox:
        message = outbox.take()
        assert message.ByteSize() < MAX_MESSAGE_BYTES
        told += message.outputs
    assert outbox.size == 0
    assert [o.sequence_id for o in told if o.prompt == prompt] == [1, 3]
    assert [(o.sequence_id, t.id) for o in told for t in o.tokens] == [(1, 7), (3, 8)]
    outbox.add(1, [Token(id=9)], 0)
    assert not outbox.take().outputs[0].HasField("prompt")
