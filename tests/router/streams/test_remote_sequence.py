"""News between a runner that delivers and a client that reads, or does not."""

import pytest

from granatum.router.streams.remote_sequence import (
    MESSAGE_BYTES,
    UNREAD_BYTES,
    UNREAD_TOKENS,
    RemoteSequence,
    SessionLost,
    Unread,
)
from granatum.v1.inference_pb2 import FINISH_REASON_STOP, Logprob, Token, TopLogprob
from granatum.v1.runner_pb2 import SequenceOutput


class Ends:
    """Counts what the sequence asks for."""

    def __init__(self) -> None:
        self.cancels = 0
        self.releases = 0
        self.sequence = RemoteSequence(self.cancel, self.release)

    def cancel(self) -> None:
        self.cancels += 1

    def release(self) -> None:
        self.releases += 1


def token(n: int, top: int = 0) -> Token:
    logprob = Logprob(top=[TopLogprob(id=i, value=-1, text="piece") for i in range(top)])
    return Token(id=n, text=f" {n}", logprob=logprob if top else None)


def news(first: int, number: int = 1, top: int = 0) -> SequenceOutput:
    return SequenceOutput(sequence_id=1, tokens=[token(first + i, top) for i in range(number)])


async def ids(sequence: RemoteSequence) -> list[int]:
    return [t.id for output in await sequence.receive(1) for t in output.tokens]


async def test_room_is_released_at_delivery_not_at_reading() -> None:
    ends = Ends()
    ends.sequence.deliver(news(0), over=False)
    assert ends.releases == 0
    ends.sequence.deliver(SequenceOutput(finished=FINISH_REASON_STOP), over=True)
    assert ends.releases == 1
    received = await ends.sequence.receive(1)
    assert [t.id for t in received[0].tokens] == [0]
    assert received[-1].finished == FINISH_REASON_STOP
    lost = Ends()
    lost.sequence.lose(SessionLost())
    assert lost.releases == 1


@pytest.mark.parametrize(("top", "most"), [(0, UNREAD_TOKENS), (20, UNREAD_BYTES // 200)])
async def test_what_is_unread_is_bounded_and_none_of_it_is_lost(top: int, most: int) -> None:
    ends = Ends()
    delivered = 0
    while not ends.cancels:
        ends.sequence.deliver(news(delivered, top=top), over=False)
        delivered += 1
        assert delivered < 2 * most
    assert ends.releases
    received: list[int] = []
    while len(received) < delivered:
        received += await ids(ends.sequence)
    assert received == list(range(delivered))
    with pytest.raises(Unread):
        await ids(ends.sequence)


async def test_a_client_that_reads_is_never_cut_short() -> None:
    ends = Ends()
    for first in range(0, 100_000, 1000):
        ends.sequence.deliver(news(first, 1000), over=False)
        received: list[int] = []
        while len(received) < 1000:
            received += await ids(ends.sequence)
        assert received == list(range(first, first + 1000))
    assert ends.cancels == 0


async def test_no_part_is_larger_than_a_message() -> None:
    ends = Ends()
    large = news(0, 5000, top=20)
    large.prompt_tokens = 7
    large.finished = FINISH_REASON_STOP
    assert large.ByteSize() > 50 * MESSAGE_BYTES
    ends.sequence.deliver(large, over=True)
    parts: list[list[SequenceOutput]] = []
    while not parts or parts[-1][-1].WhichOneof("outcome") is None:
        parts.append(await ends.sequence.receive(1))
    assert all(sum(o.ByteSize() for o in part) <= MESSAGE_BYTES + 1000 for part in parts)
    merged = SequenceOutput()
    for part in parts:
        for output in part:
            merged.MergeFrom(output)
    assert merged == large


async def test_silence_is_a_timeout_and_the_sequence_goes_on() -> None:
    ends = Ends()
    with pytest.raises(TimeoutError):
        await ends.sequence.receive(0.01)
    ends.sequence.deliver(news(3), over=False)
    assert await ids(ends.sequence) == [3]
    ends.sequence.cancel()
    assert (ends.cancels, ends.releases) == (1, 1)


async def test_a_long_prompt_is_kept_and_counts_as_nothing_unread() -> None:
    sequence = Ends().sequence
    first = news(0)
    first.prompt.ids.extend(range(UNREAD_BYTES))
    sequence.deliver(first, over=False)
    assert sequence.prompt is not None
    assert list(sequence.prompt.ids) == list(range(UNREAD_BYTES))
    (received,) = await sequence.receive(1)
    assert received == news(0)
    sequence.deliver(news(1), over=False)
    assert await ids(sequence) == [1]
