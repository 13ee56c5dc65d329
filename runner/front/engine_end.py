"""How an engine's process ended, and which of its sequences may be the cause. No torch."""

import signal
from dataclasses import dataclass

from granatum.runner.records import Departure
from granatum.v1.errors import GranatumError

_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)
"""Signals that a process brings upon itself; all other signals come from outside."""


@dataclass(frozen=True, slots=True)
class EngineEnd:
    """The end of one engine."""

    status: int
    """Its exit status, or minus the signal that ended it."""
    step: tuple[int, ...] = ()
    """The engine's ids of the sequences in the steps in flight."""
    cause: str = ""
    """What the engine said of its end, for operators; empty: nothing."""
    own: bool = False
    """Whether the engine failed by itself, whatever its status says."""

    def departure_of(self, engine_id: int) -> Departure:
        """How a sequence departs. Only a sequence in a failed step is suspected or blamed."""
        crashed = self.own or self.status > 0 or -self.status in _CRASHES
        if not crashed or engine_id not in self.step:
            return Departure.ENGINE_LOST
        return Departure.BLAMED if len(self.step) == 1 else Departure.SUSPECTED

    def __str__(self) -> str:
        """Why the engine ended, and what to do."""
        if self.cause:
            return self.cause
        if self.status >= 0:
            return f"it ended by itself with status {self.status}: its log says why"
        name = _name(-self.status)
        if -self.status == signal.SIGKILL:
            return f"{name}: something killed it, such as the kernel when memory runs out"
        return f"{name} ended it: its log may say why"


def cause_of(error: Exception) -> str:
    """What operators are told of an error that ended the engine."""
    if isinstance(error, GranatumError):
        return error.message
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"memory ran out ({said}): choose a smaller model, --max-batch, --prefill-tokens or "
            "--memory-fraction, or a device that nothing else uses"
        )
    return f"{said} (the log above has the details)"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
