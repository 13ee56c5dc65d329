"""One sequence in the engine: its tokens, its pages, how far it is. No torch."""

from dataclasses import dataclass, field

from granatum.runner.records import Departure, Failure, Finish, Submit

Outcome = Finish | Departure | Failure


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence from its submission until it leaves.

    `tokens` are those the host knows; `pending` more (0 or 1) were sampled on the device by a step
    that is not collected yet. `computed` tokens have their KV in `pages`, those of steps in flight
    included.
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
    """Steps that use its pages and are not collected."""
    seat: int | None = None
    slot: int = -1
    """Of its adapter; -1: the base model."""
    outcome: Outcome | None = None
    """Set as soon as it is known that it will not be scheduled again."""
    told: bool = False
    """Its outcome is out: nothing more is said of it, whatever steps in flight bring."""
    cancelled: bool = False

    @property
    def id(self) -> int:
        """As the front calls it."""
        return self.submit.sequence_id

    @property
    def length(self) -> int:
        """Tokens, the pending one included."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed; 1 for a decode."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def generated(self) -> int:
        """Generated tokens, the pending one included."""
        return self.length - len(self.submit.prompt)

    @property
    def schedulable(self) -> bool:
        """Whether it has another token to make, as far as the host knows."""
        return self.outcome is None and not self.cancelled and self.length < self.limit

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: by priority, then by arrival."""
        return (-self.submit.priority, self.arrival)

    def finish_of(self, token: int) -> Finish | None:
        """Whether `token`, just appended, ends it."""
        made = len(self.tokens) - len(self.submit.prompt)
        if token in self.submit.stop_ids and made > self.submit.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.limit else None
