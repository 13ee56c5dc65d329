"""What a session has yet to tell its router, in messages that any router takes."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from granatum.v1.inference_pb2 import Token
from granatum.v1.runner_pb2 import SequenceOutput, SessionResponse

PART_BYTES = 256 << 10
"""From this size on, a sequence's output goes on in another one."""
MESSAGE_BYTES = 1 << 20
"""From this size on, the rest goes with the next message; far below what gRPC takes."""
_TOKEN_BYTES = 64
"""What a token takes in memory beside its fields."""


@dataclass(slots=True)
class _Part:
    """An output of one sequence and about how many bytes its tokens take."""

    output: SequenceOutput
    size: int = 0


class Outbox:
    """Outputs by sequence, oldest first. What is not taken is merged, a sequence's into one."""

    def __init__(self) -> None:
        self._full: deque[_Part] = deque()
        self._last: OrderedDict[int, _Part] = OrderedDict()  # by sequence
        self.size = 0
        """About how many bytes are in it."""

    def __bool__(self) -> bool:
        return bool(self._full or self._last)

    def add(self, sequence_id: int, tokens: Iterable[Token], prompt_tokens: int) -> SequenceOutput:
        """Add news of a sequence; the output with the last of them, which may get an outcome."""
        part = self._last.get(sequence_id) or self._begin(sequence_id)
        part.output.prompt_tokens = part.output.prompt_tokens or prompt_tokens
        for token in tokens:
            if part.size >= PART_BYTES:
                self._full.append(self._last.pop(sequence_id))
                part = self._begin(sequence_id)
            size = token.ByteSize() + _TOKEN_BYTES
            part.output.tokens.append(token)
            part.size += size
            self.size += size
        return part.output

    def take(self) -> SessionResponse:
        """The next message, and out of here."""
        outputs, size = [], 0
        while (self._full or self._last) and size < MESSAGE_BYTES:
            part = self._full.popleft() if self._full else self._last.popitem(last=False)[1]
            outputs.append(part.output)
            size += part.size
        self.size -= size
        return SessionResponse(outputs=outputs)

    def discard(self, sequence_id: int) -> None:
        """Forget what there is of a sequence."""
        last = self._last.pop(sequence_id, None)
        gone = [part for part in self._full if part.output.sequence_id == sequence_id]
        self._full = deque(part for part in self._full if part.output.sequence_id != sequence_id)
        self.size -= sum(part.size for part in (gone if last is None else [*gone, last]))

    def _begin(self, sequence_id: int) -> _Part:
        part = self._last[sequence_id] = _Part(SequenceOutput(sequence_id=sequence_id))
        return part
