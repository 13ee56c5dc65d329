"""What front and engine tell each other. No torch.

front  -- Submit, Cancel, SetDraining, Stop -->  engine
front  <-- Ready once, then StepReport ---------  engine
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from granatum.v1.errors import Code, GranatumError


class Finish(Enum):
    """Why a sequence is complete."""

    STOP = "stop"
    LENGTH = "length"


class Departure(Enum):
    """Why a sequence leaves unfinished; its router places it again with its tokens so far."""

    REFUSED = "refused"
    EVICTED = "evicted"
    DRAINED = "drained"
    ENGINE_LOST = "engine lost"
    SUSPECTED = "suspected"
    BLAMED = "blamed"
    LOAD_FAILED = "load failed"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that ends a sequence, as its client is told."""

    code: Code
    message: str
    reason: str
    field: str = ""
    """The request's field that is wrong; empty: none is."""

    @classmethod
    def of(cls, error: GranatumError) -> Self:
        """The failure that tells a client of `error`."""
        return cls(error.code, error.message, error.reason, error.field or "")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The defaults take the most likely token and penalize nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        neutral = (self.presence_penalty, self.frequency_penalty) == (0.0, 0.0)
        return not neutral or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Submit:
    """A sequence to run; other runners have already made the tokens in `generated`."""

    sequence_id: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...] = ()
    adapter: str | None = None
    """64 hexadecimal digits; None: the base model."""
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1
    """The most generated tokens in all, `generated` included."""
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    """None: no log probabilities. n: the chosen token's, and those of the n most likely tokens."""
    priority: int = 0
    suspicion: int = 0
    """How often an engine failed in a step with the sequence; above 0: it gets its own steps."""
    forced: tuple[int, ...] = ()
    """The first tokens that are taken in place of drawn ones, those in `generated` included."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget a sequence: its client is gone or a stop string appeared. Unknown ids are ignored."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class SetDraining:
    """Begin or end draining: the engine gives its sequences back and refuses new ones."""

    draining: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine process."""


Command = Submit | Cancel | SetDraining | Stop


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: of the chosen token, and of the most likely ones."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), the most likely first."""


@dataclass(frozen=True, slots=True)
class SequenceNews:
    """What a step brought for one sequence; `outcome` is set on its last news."""

    sequence_id: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, or none if the sequence asked for none."""
    outcome: Finish | Departure | Failure | None = None
    cause: Failure | None = None
    """With LOAD_FAILED: the error for the client, should no other runner load the adapter."""

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        """Pickle as a call, which is 3 times as fast: every step pickles news of every sequence."""
        fields = (self.sequence_id, self.tokens, self.logprobs, self.outcome)
        return type(self), fields if self.cause is None else (*fields, self.cause)


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """The engine's state as heartbeats report it."""

    sequences: int
    total_pages: int
    free_pages: int
    reclaimable_pages: int
    decode_steps: int
    decode_sequences: int
    decode_adapters: int
    adapter_loads: int
    load_trouble: str = ""
    """Why adapters cannot be loaded just now; empty: they can."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves: the model is loaded, graphs are captured."""

    max_batch: int
    page_tokens: int
    max_context: int
    figures: EngineFigures
    max_rank: int = 0
    max_adapter_elements: int = 0
    """Elements of the largest adapter that device and host memory have room for."""
    step_s: float = 0.0
    """How long the largest step takes on a CPU. 0 on a GPU, where every step is short."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One message for each step with news, and one at least every half second.

    An idle engine runs a probe step on the device before it reports. So a report proves that the
    engine computes, not only that its process lives.
    """

    news: tuple[SequenceNews, ...]
    figures: EngineFigures
    resident: tuple[str, ...] | None = None
    """Digests of the adapters on the device, if they have changed since the last report."""


@dataclass(frozen=True, slots=True)
class EngineFault:
    """The engine's last word: a step failed, and the device cannot be used any more."""

    sequences: tuple[int, ...]
    """The sequences that the step computed."""
    message: str
    """For the log."""


Report = Ready | StepReport | EngineFault
