"""Runs plans on the device: prepare the inputs, launch, and wait for the tokens when asked."""

import time
from dataclasses import dataclass, replace
from itertools import product

import torch

from granatum.kernels.backend import compiling_ahead
from granatum.kernels.lora.tuning import PREFILL_BLOCK_M
from granatum.kernels.sampling.greedy import greedy, greedy_workspace_elements
from granatum.runner.engine.execution.capture import Capturer, Graph
from granatum.runner.engine.execution.graphs import Graphs, covering, holds
from granatum.runner.engine.execution.sampler import PendingLogprobs, Sampler
from granatum.runner.engine.phases import phase
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan
from granatum.runner.model.decoder import Model
from granatum.runner.model.inputs import (
    DeviceInputs,
    HostInputs,
    Step,
    StepShape,
    decode_shape,
    mixed_shape,
)
from granatum.runner.records import TokenLogprobs

ALL_KERNELS = 2
"""Layers that launch every kernel: only the first one differs from those after it."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched."""

    plan: Plan
    _drawn: torch.Tensor
    _logprobs: PendingLogprobs | None
    _done: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], dict[int, TokenLogprobs], frozenset[int]]:
        """Its tokens, one per sampling span; log probabilities by sequence id; unsound sequences.

        A sequence is unsound, named by its id, if its logits are not finite: it got no token.
        """
        if self._done is not None:
            self._done.synchronize()
        spans = self.plan.sampling
        tokens, sound = self._drawn[:, : len(spans)].tolist()
        pairs = zip(spans, sound, strict=True)
        unsound = frozenset(span.sequence.id for span, is_sound in pairs if not is_sound)
        return tokens, {} if self._logprobs is None else self._logprobs.read(), unsound


class Executor:
    """Computes steps of `model`.

    On a GPU, steps of common shapes run as CUDA graphs. A few that hold every plan are captured
    here, the others by `capture_next`. Without `graphs` the same shapes are launched kernel by
    kernel, for memory checkers. The two host buffers alternate: when one is filled again, the step
    that was copied from it has been collected.
    """

    def __init__(self, model: Model, limits: EngineLimits, *, graphs: bool = True) -> None:
        self._model = model
        self._shapes = _shapes(limits)
        self._rows, self._context = limits.prefill_tokens, limits.max_context
        device = model.device
        self._cuda = device.type == "cuda"
        self._hosts = [HostInputs(limits, self._cuda) for _ in range(2)]
        self._inputs = DeviceInputs(limits, device)
        seats = limits.max_batch + 1  # one more, for padding
        self._last = torch.zeros(seats, dtype=torch.int32, device=device)
        # Tokens, and whether each row was sound: side by side, for one copy to the host.
        self._drawn = torch.zeros(2, limits.max_batch, dtype=torch.int32, device=device)
        elements = greedy_workspace_elements(limits.max_batch, model.config.vocab)
        self._best = torch.zeros(elements, dtype=torch.int64, device=device)
        self._sampler = Sampler(model.config.vocab, seats, device)
        self._landed = [
            torch.zeros(self._drawn.shape, dtype=torch.int32, pin_memory=self._cuda)
            for _ in range(2)
        ]
        self._turn = 0
        self._graphs = self._first_graphs() if self._cuda and graphs else None

    def launch(self, plan: Plan) -> Flight:
        """Start a step; nothing here waits for the device."""
        shape = self._shape(plan)
        host, out = self._hosts[self._turn], self._landed[self._turn]
        self._turn = 1 - self._turn
        general = Sampler.is_needed(plan)
        self._inputs.copy(host, host.fill(plan, shape, sampling=general))
        logits = self._run(shape)
        count = len(plan.sampling)
        logprobs = None
        if general:
            step = self._inputs.view(replace(shape, samples=count))
            tokens, sound = self._drawn[:, :count]
            logprobs = self._sampler.sample(plan, logits[:count], step, tokens, sound)
            self._last.index_copy_(0, step.seats.long(), tokens)
        out.copy_(self._drawn, non_blocking=True)
        return Flight(plan, out, logprobs, self._mark())

    def graph_due(self, *, idle: bool) -> bool:
        """Whether another graph should be captured now; `idle`: no sequence waits for a step."""
        return self._graphs is not None and self._graphs.due(idle=idle)

    def capture_next(self) -> None:
        """Capture the graph that is due. No step may be in flight. An error ends all captures."""
        assert self._graphs is not None
        self._graphs.capture_next()

    def probe(self) -> None:
        """Compute a step of padding, to its end."""
        shape = self._shape(Plan())
        host = self._hosts[self._turn]
        self._inputs.copy(host, host.fill(Plan(), shape, sampling=False))
        self._run(shape)
        if self._cuda:
            torch.cuda.synchronize()

    def is_lost(self) -> bool:
        """Whether the device no longer works. If it works, this waits until the device is idle."""
        if not self._cuda:
            return False
        try:
            torch.zeros(1, device=self._model.device).add_(1)
            torch.cuda.synchronize()
        except Exception:  # whatever it is: this works on every device that works
            return True
        return False

    def forget(self, plan: Plan) -> None:
        """Undo what the device remembers of a failed step."""
        self._sampler.forget(plan)

    def measure(self) -> float:
        """Seconds of the longest step without adapters; 0 on a GPU, where it is short.

        The step has the most rows, at the end of the longest context. One layer's attention is
        timed and multiplied by the layers; at that length attention takes several times as long as
        all the rest.
        """
        if self._cuda:
            return 0.0
        step = self._inputs.view(mixed_shape(self._rows, 0, 1, 1, lora=False))
        started = time.monotonic()
        self._compute(step)
        computed = time.monotonic()
        self._model.attend_far(self._rows, self._context)
        attended = time.monotonic()
        return computed - started + self._model.config.layers * (attended - computed)

    def _first_graphs(self) -> Graphs[Graph]:
        """Compile every kernel, so that no step waits for a compiler; capture the first graphs."""
        with phase("compiling kernels", "kernels compiled"):
            with compiling_ahead():
                self._launch_all_kernels(ALL_KERNELS)
            self._launch_all_kernels()  # loads the kernels
            torch.cuda.synchronize()
        capturer = Capturer(self._compute, self._inputs)
        with phase("capturing graphs", "graphs captured", graphs=len(covering(self._shapes))):
            return Graphs(capturer.capture, capturer.capture_if_room, self._shapes)

    def _launch_all_kernels(self, layers: int | None = None) -> None:
        """Launch a step of padding of each shape, and what draws tokens."""
        self._sampler.launch_all_kernels(self._inputs.view(decode_shape(1, lora=False)))
        for shape in reversed(self._shapes):
            self._compute(self._inputs.view(shape), layers)

    def _shape(self, plan: Plan) -> StepShape:
        """The smallest common shape that holds `plan`; on a CPU, the plan's exact shape."""
        if self._graphs is not None:
            return self._graphs.shape_for(plan)
        if self._cuda:
            return next(shape for shape in self._shapes if holds(shape, plan))
        if plan.chunks:
            sampling = max(len(plan.sampling), 1)
            sizes = (plan.rows, len(plan.decodes), sampling, len(plan.spans))
            return mixed_shape(*sizes, lora=plan.lora)
        return decode_shape(max(plan.rows, 1), lora=plan.lora)

    def _run(self, shape: StepShape) -> torch.Tensor:
        if self._graphs is not None:
            return self._graphs[shape].replay()
        return self._compute(self._inputs.view(shape))

    def _compute(self, step: Step, layers: int | None = None) -> torch.Tensor:
        """Logits [samples, vocab]; the most likely tokens are drawn and feed the next step."""
        logits = self._model.forward(step, self._last, layers)
        tokens, sound = self._drawn[:, : step.shape.samples]
        greedy(logits, tokens, self._best, self._last, step.seats, sound)
        return logits

    def _mark(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


def _shapes(limits: EngineLimits) -> tuple[StepShape, ...]:
    """The shapes with a graph: of decodes alone, then with prompts' chunks, smallest first.

    Chunks that come alone, and steps without adapters, have graphs of their own.
    """
    batch = limits.max_batch
    decodes = {min(n, batch) for n in (1, 2, 4, *range(8, batch + 8, 8))}
    alone = (decode_shape(n, lora=lora) for n, lora in product(sorted(decodes), (False, True)))
    mixed = (
        mixed_shape(rows, beside, batch, batch, lora=lora)
        for rows, beside, lora in product(_mixed_rows(limits), (0, batch), (False, True))
    )
    return (*alone, *mixed)


def _mixed_rows(limits: EngineLimits) -> list[int]:
    """Rows of steps with chunks: from long tiles on, four sizes to a doubling."""
    largest = limits.prefill_tokens
    rows = {largest}
    while (half := min(rows) // 2) >= max(limits.max_batch, 32):
        rows.add(half)
        if half >= PREFILL_BLOCK_M:
            between = (half * quarters // 4 for quarters in (5, 6, 7))
            rows |= {-(-n // PREFILL_BLOCK_M) * PREFILL_BLOCK_M for n in between}
    return sorted(n for n in rows if n <= largest)
