"""Choosing tokens where the most likely one will not do: drawn ones, and given ones."""

from dataclasses import dataclass

import torch

from granatum.kernels.sampling.penalties import count_tokens, penalize, start_counts
from granatum.kernels.sampling.sample import sample
from granatum.runner.engine.scheduling.plan import Plan, Span
from granatum.runner.engine.scheduling.sequence import Sequence
from granatum.runner.model.inputs import Step
from granatum.runner.records import TokenLogprobs


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log probabilities on their way to the host, which have arrived when their step is done.

    chosen [n], top and top_ids [n, k] of the n sequences that asked; k: the most that one wants.
    """

    spans: tuple[Span, ...]
    chosen: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    def read(self) -> dict[int, TokenLogprobs]:
        """By sequence id."""
        columns = (self.chosen.tolist(), self.top.tolist(), self.top_ids.tolist())
        found = {}
        for span, chosen, values, ids in zip(self.spans, *columns, strict=True):
            submit = span.sequence.submit
            top = tuple(zip(ids, values, strict=True))[: submit.top_logprobs or 0]
            found[submit.sequence_id] = TokenLogprobs(chosen, top)
        return found


class Sampler:
    """Samples by temperature, filters and penalties, and reports log probabilities.

    Penalties need to know what each sequence has generated, which the host learns late: counts
    int32 [seats, vocab] live on the device.
    """

    def __init__(self, vocab: int, seats: int, device: torch.device) -> None:
        self._counts = torch.zeros(seats, vocab, dtype=torch.int32, device=device)
        self._counted: dict[int, Sequence] = {}

    def launch_all_kernels(self, step: Step) -> None:
        """Draw for a row of padding, by every kernel; nothing stays."""
        logits = torch.zeros(1, self._counts.shape[1], device=self._counts.device)
        drawn = torch.zeros(2, *step.seats.shape, dtype=step.seats.dtype, device=logits.device)
        self._draw(logits, step, drawn[0], drawn[1], penalized=True)
        self._counts.zero_()

    @staticmethod
    def is_needed(plan: Plan) -> bool:
        """Whether some row of the step needs more than its most likely token."""
        return any(_needs_sampler(span) for span in plan.sampling)

    def sample(
        self,
        plan: Plan,
        logits: torch.Tensor,
        step: Step,
        tokens: torch.Tensor,
        sound: torch.Tensor,
    ) -> PendingLogprobs | None:
        """Draw the tokens int32 [n] of the step's n sampling spans; log probabilities if wanted.

        logits float32 [n, vocab] stay as they are. sound int32 [n]: whether a token was found.
        """
        spans = plan.sampling
        penalized = any(span.sequence.submit.sampling.penalized for span in spans)
        masked = any(_stops_masked(span) for span in spans)
        adjusted = logits.clone() if penalized or masked else logits
        if penalized:
            self._start_counts(spans)
        if masked:
            _mask_stops(spans, adjusted)
        self._draw(adjusted, step, tokens, sound, penalized=penalized)
        _force(spans, tokens)
        return _logprobs(spans, logits, tokens)

    def forget(self, plan: Plan) -> None:
        """Count the tokens of a step's sequences anew: the counts may hold tokens that never were.

        The host must know all their tokens when the next step with them is launched.
        """
        for span in plan.spans:
            if span.sequence.seat is not None:
                self._counted.pop(span.sequence.seat, None)

    def _draw(
        self,
        logits: torch.Tensor,
        step: Step,
        tokens: torch.Tensor,
        sound: torch.Tensor,
        *,
        penalized: bool,
    ) -> None:
        p = step.sampling
        if penalized:
            penalize(logits, self._counts, step.seats, p.repetition, p.presence, p.frequency)
        sample(logits, p.temperature, p.top_k, p.top_p, p.min_p, p.uniform, tokens, sound)
        if penalized:
            count_tokens(self._counts, step.seats, tokens)

    def _start_counts(self, spans: tuple[Span, ...]) -> None:
        """Begin the counts of new sequences, whose tokens are all known to the host."""
        for span in spans:
            sequence, seat = span.sequence, span.sequence.seat
            assert seat is not None
            if self._counted.get(seat) is not sequence and sequence.submit.sampling.penalized:
                self._counted[seat] = sequence
                tokens = torch.tensor(sequence.tokens).to(self._counts.device)
                prompt = len(sequence.submit.prompt)
                start_counts(self._counts, seat, tokens[:prompt], tokens[prompt:])


def _needs_sampler(span: Span) -> bool:
    submit = span.sequence.submit
    greedy = submit.sampling.greedy and not submit.sampling.penalized
    wanted = submit.top_logprobs is not None or span.forced is not None
    return not greedy or wanted or _stops_masked(span)


def _stops_masked(span: Span) -> bool:
    """Whether the token it makes must not end it."""
    submit = span.sequence.submit
    return bool(submit.stop_ids) and span.made < submit.min_tokens


def _mask_stops(spans: tuple[Span, ...], logits: torch.Tensor) -> None:
    """Make the stop ids of sequences below their least length impossible.

    The model's own stop ids may lie beyond the vocabulary; they need no mask.
    """
    pairs = [
        (row, stop)
        for row, span in enumerate(spans)
        if _stops_masked(span)
        for stop in span.sequence.submit.stop_ids
        if 0 <= stop < logits.shape[1]
    ]
    if pairs:
        rows, stops = torch.tensor(pairs).to(logits.device, non_blocking=True).unbind(1)
        logits[rows, stops] = -torch.inf


def _force(spans: tuple[Span, ...], tokens: torch.Tensor) -> None:
    """Put given tokens in place of drawn ones.

    The next step is fed from `tokens`, so the host need not know which were drawn.
    """
    pairs = [(row, token) for row, s in enumerate(spans) if (token := s.forced) is not None]
    if pairs:
        given = torch.tensor(pairs, dtype=tokens.dtype).to(tokens.device, non_blocking=True)
        tokens[given[:, 0].long()] = given[:, 1]


def _logprobs(
    spans: tuple[Span, ...], logits: torch.Tensor, tokens: torch.Tensor
) -> PendingLogprobs | None:
    """Start bringing what the sequences asked for to the host."""
    asked = [i for i, s in enumerate(spans) if s.sequence.submit.top_logprobs is not None]
    if not asked:
        return None
    rows = torch.tensor(asked).to(logits.device, non_blocking=True)
    values = torch.log_softmax(logits[rows], dim=-1)
    most = max(spans[i].sequence.submit.top_logprobs or 0 for i in asked)
    top, ids = values.topk(most, dim=-1)
    chosen = values.gather(1, tokens[rows].long()[:, None])[:, 0]
    on_host = (_to_host(x) for x in (chosen, top, ids))
    return PendingLogprobs(tuple(spans[i] for i in asked), *on_host)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is there when the stream has come to it."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor, non_blocking=True)
