"""News that a session has not sent yet, in messages of a size that any router takes."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from granatum.v1.inference_pb2 import Token, TokenIds
from granatum.v1.runner_pb2 import SequenceOutput, SessionResponse

PART_BYTES = 256 << 10
"""A sequence's output that has this size is full; its next tokens begin another output."""
MESSAGE_BYTES = 1 << 20
"""A message that has this size is full; it is far smaller than what gRPC takes."""
_TOKEN_BYTES = 64
"""What a token takes in memory beside the bytes of its fields."""


@dataclass(slots=True)
class _Part:
    """An output of one sequence; `size` is about how many bytes its tokens and prompt take."""

    output: SequenceOutput
    size: int = 0


class Outbox:
    """Outputs by sequence, oldest first. News of a sequence are added to its output until sent."""

    def __init__(self) -> None:
        self._full: deque[_Part] = deque()
        self._last: OrderedDict[int, _Part] = OrderedDict()  # by sequence
        self.size = 0
        """About how many bytes all outputs take."""

    def __bool__(self) -> bool:
        return bool(self._full or self._last)

    def add(
        self,
        sequence_id: int,
        tokens: Iterable[Token],
        prompt_tokens: int,
        prompt: TokenIds | None = None,
    ) -> SequenceOutput:
        """Add a sequence's tokens, and its prompt if the router lacks it.

        Returns the output of the last token, for the caller's outcome.
        """
        part = self._last.get(sequence_id) or self._begin(sequence_id)
        part.output.prompt_tokens = part.output.prompt_tokens or prompt_tokens
        if prompt is not None:
            part.output.prompt.CopyFrom(prompt)
            self._grow(part, prompt.ByteSize())
        for token in tokens:
            if part.size >= PART_BYTES:
                self._full.append(self._last.pop(sequence_id))
                part = self._begin(sequence_id)
            part.output.tokens.append(token)
            self._grow(part, token.ByteSize() + _TOKEN_BYTES)
        return part.output

    def take(self) -> SessionResponse:
        """Take out the next message."""
        outputs, size = [], 0
        while (self._full or self._last) and size < MESSAGE_BYTES:
            part = self._full.popleft() if self._full else self._last.popitem(last=False)[1]
            outputs.append(part.output)
            size += part.size
        self.size -= size
        return SessionResponse(outputs=outputs)

    def discard(self, sequence_id: int) -> None:
        """Forget the outputs of a sequence."""
        last = self._last.pop(sequence_id, None)
        gone = [part for part in self._full if part.output.sequence_id == sequence_id]
        self._full = deque(part for part in self._full if part.output.sequence_id != sequence_id)
        self.size -= sum(part.size for part in (gone if last is None else [*gone, last]))

    def _grow(self, part: _Part, size: int) -> None:
        part.size += size
        self.size += size

    def _begin(self, sequence_id: int) -> _Part:
        part = self._last[sequence_id] = _Part(SequenceOutput(sequence_id=sequence_id))
        return part
