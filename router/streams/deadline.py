"""How long a call may take."""

import asyncio
from dataclasses import dataclass

_MARGIN = 0.1
_LONGEST_MARGIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a call arrived and when it must be given up, on the event loop's clock."""

    arrived: float
    give_up_at: float | None

    @classmethod
    def from_remaining(cls, seconds: float | None) -> "Deadline":
        """The deadline of a call that just arrived, for which its client waits `seconds` more.

        None: no limit. A call is given up a little early, so that its client still learns why.
        """
        now = asyncio.get_running_loop().time()
        if seconds is None:
            return cls(now, None)
        return cls(now, now + seconds - min(_MARGIN * seconds, _LONGEST_MARGIN_S))

    def give_up(self, patience_s: float) -> float:
        """When to end a wait that begins now. A call without a deadline waits for `patience_s`."""
        if self.give_up_at is not None:
            return self.give_up_at
        return asyncio.get_running_loop().time() + patience_s
