"""One sequence in the engine: its tokens, its pages, its progress. No torch."""

from dataclasses import dataclass, field

from granatum.runner.records import Departure, Failure, Finish, Submit

Outcome = Finish | Departure | Failure


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence from its submission until it leaves.

    `tokens` are the tokens that the host knows. A step that is not collected yet may have sampled
    one more on the device; `pending` counts it (0 or 1). `computed` tokens have their KV in
    `pages`, tokens of steps in flight included.
    """

    submit: Submit
    arrival: int
    limit: int
    """The length, prompt included, at which it ends."""
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    in_flight: int = 0
    """Steps in flight that use its pages."""
    seat: int | None = None
    slot: int = -1
    """The slot of its adapter; -1: the base model."""
    outcome: Outcome | None = None
    """Set as soon as it is known that no further step computes the sequence."""
    told: bool = False
    """Whether the front knows the outcome; nothing is told after it."""
    cancelled: bool = False

    @property
    def id(self) -> int:
        """The front's id of the sequence."""
        return self.submit.sequence_id

    @property
    def length(self) -> int:
        """Tokens, the pending one included."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens without KV so far, the pending one included; 1 for a decode."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def generated(self) -> int:
        """Generated tokens, the pending one included."""
        return self.length - len(self.submit.prompt)

    @property
    def schedulable(self) -> bool:
        """Whether it has another token to make, by what the host knows."""
        return self.outcome is None and not self.cancelled and self.length < self.limit

    @property
    def rank(self) -> tuple[int, int]:
        """The order of service, smallest first: by priority, then by arrival."""
        return (-self.submit.priority, self.arrival)

    def finish_of(self, token: int) -> Finish | None:
        """How the sequence ends if its last token is `token`; None if it goes on."""
        made = len(self.tokens) - len(self.submit.prompt)
        if token in self.submit.stop_ids and made > self.submit.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.limit else None
