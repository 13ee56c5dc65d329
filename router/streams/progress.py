"""What a client has of its stream so far, and what the next runner needs to continue it."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from granatum.router.streams.request import AcceptedRequest
from granatum.v1.inference_pb2 import (
    GenerateResponse,
    GenerationEnd,
    GenerationStart,
    Timings,
    Usage,
)
from granatum.v1.runner_pb2 import SequenceOutput, SubmitSequence


@dataclass(slots=True)
class Progress:
    """A stream so far. All times are seconds of one monotonic clock."""

    request: AcceptedRequest
    arrived: float
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    characters: int = 0
    prompt_tokens: int = 0
    placements: int = 0
    placed: float | None = None
    first_token: float | None = None
    started: bool = False

    @property
    def resumptions(self) -> int:
        """How often the sequence went to a runner, after its first one."""
        return max(0, self.placements - 1)

    @property
    def tokens_to_hold(self) -> int:
        """Tokens that the next runner must have room for; an estimate until a runner counted."""
        return (self.prompt_tokens or self.request.estimated_tokens) + len(self.tokens)

    def submission(self, now: float, suspicion: int = 0) -> SubmitSequence:
        """The sequence for its next runner."""
        self.placements += 1
        if self.placed is None:
            self.placed = now
        return SubmitSequence(
            adapter_digest=self.request.adapter_digest,
            adapter_chat=self.request.adapter_chat,
            request=self.request.message,
            generated=self.tokens,
            text_delivered=self.characters,
            suspicion=suspicion,
            forced=self.request.forced,
        )

    def absorb(
        self, news: Iterable[SequenceOutput], runner_id: str, now: float
    ) -> GenerateResponse:
        """The message to the client: the news' tokens, the start if it is the first, the end."""
        response = GenerateResponse()
        for output in news:
            response.tokens.extend(output.tokens)
            for token in output.tokens:
                self.tokens.append(token.id)
                self.characters += len(token.text)
            self.prompt_tokens = output.prompt_tokens or self.prompt_tokens
            if output.HasField("finished"):
                response.end.reason = output.finished
        if self.first_token is None and response.tokens:
            self.first_token = now
        if response.HasField("end"):
            response.end.MergeFrom(self._end(runner_id, now))
        if not self.started and (response.tokens or response.HasField("end")):
            self.started = True
            response.start.CopyFrom(self._start(runner_id))
        return response

    def _start(self, runner_id: str) -> GenerationStart:
        return GenerationStart(
            request_id=self.request.request_id,
            adapter_digest=self.request.adapter_digest,
            adapter=self.request.adapter,
            runner_id=runner_id,
        )

    def _end(self, runner_id: str, now: float) -> GenerationEnd:
        assert self.placed is not None
        usage = Usage(prompt_tokens=self.prompt_tokens, completion_tokens=len(self.tokens))
        timings = Timings(
            queue_s=self.placed - self.arrived,
            first_token_s=(self.first_token or now) - self.arrived,
            total_s=now - self.arrived,
            resumptions=self.resumptions,
        )
        return GenerationEnd(usage=usage, timings=timings, runner_id=runner_id)
