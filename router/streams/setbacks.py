"""What counts against a sequence, and which runners it should avoid next."""

from dataclasses import dataclass, field

from granatum.v1 import runner_pb2
from granatum.v1.errors import (
    RETRY_AFTER_S,
    GranatumError,
    Internal,
    Overloaded,
    Unavailable,
    from_code,
)
from granatum.v1.runner_pb2 import SequenceFailure, SequenceOutput

_AVOID_S = 2.0
_LOAD_AVOID_S = 30.0
_FIRST_DELAY_S = 0.02
_LONGEST_DELAY_S = 1.0
_FATAL_LOSSES = 4
"""So many runners lost in a row, with this sequence alone on each, blame the sequence."""
_FATAL_BLAMES = 2
"""So many engines that failed in a step of this sequence alone blame the sequence."""
_FATAL_LOADS = 3
"""The runners in a row that may fail to load the adapter before no other runner is asked."""


class FailedLoads:
    """Which runners just failed to load which adapters, known to all streams of this router."""

    def __init__(self) -> None:
        self._until: dict[str, dict[str, float]] = {}  # by digest and runner

    def note(self, runner_id: str, digest: str, now: float) -> None:
        """A runner just failed to load an adapter."""
        self._until = {key: u for key, u in self._until.items() if max(u.values()) > now}
        self._until.setdefault(digest, {})[runner_id] = now + _LOAD_AVOID_S

    def runners(self, digest: str, now: float) -> set[str]:
        """The runners that failed to load an adapter a moment ago."""
        return {id_ for id_, until in self._until.get(digest, {}).items() if until > now}


@dataclass(slots=True)
class Setbacks:
    """The setbacks of one sequence.

    A method that notes a setback raises an error if the case is hopeless.

    Only evidence counts. A runner that is lost with several sequences says nothing about any one.
    """

    suspicion: int = 0
    """How often an engine failed in a step that computed this sequence."""
    _in_vain: int = 0
    _losses: int = 0
    _blames: int = 0
    _failed_loads: set[str] = field(default_factory=set)
    _avoided: dict[str, float] = field(default_factory=dict)

    def progressed(self) -> None:
        """A token came, so this sequence did not harm the runner that made it."""
        self._in_vain = self._losses = 0
        self._failed_loads.clear()

    def lost(self, runner_id: str, now: float, *, alone: bool) -> None:
        """A runner was lost. Raises Unavailable if too many were lost with this sequence alone."""
        self._losses += alone
        if self._losses >= _FATAL_LOSSES:
            raise Unavailable(
                f"{self._losses} runners were lost one after another with this request alone on "
                "them: it is not tried again",
                reason="RUNNERS_LOST",
            )
        self._leave(runner_id, now, _AVOID_S)

    def departed(self, runner_id: str, last: SequenceOutput, now: float) -> None:
        """A runner gave the sequence back. Raises the client's error if the case is hopeless."""
        avoid_s = _AVOID_S
        match last.departed:
            case runner_pb2.DEPARTURE_SUSPECTED:
                self.suspicion += 1
            case runner_pb2.DEPARTURE_BLAMED:
                self.suspicion += 1
                self._blame()
            case runner_pb2.DEPARTURE_LOAD_FAILED:
                self._load_failed(runner_id, last.cause)
                avoid_s = _LOAD_AVOID_S
        self._leave(runner_id, now, avoid_s)

    def avoided(self, now: float) -> set[str]:
        """The runners that the sequence should avoid now."""
        return {runner_id for runner_id, until in self._avoided.items() if until > now}

    @property
    def longest_delay(self) -> float:
        """The most seconds before the next placement: 0 at first, then longer each time."""
        if self._in_vain < 2:
            return 0.0
        return min(_FIRST_DELAY_S * 2.0 ** min(self._in_vain - 2, 10), _LONGEST_DELAY_S)

    def _leave(self, runner_id: str, now: float, avoid_s: float) -> None:
        self._in_vain += 1
        self._avoided[runner_id] = max(self._avoided.get(runner_id, 0.0), now + avoid_s)

    def _blame(self) -> None:
        self._blames += 1
        if self._blames >= _FATAL_BLAMES:
            raise Internal(
                f"{self._blames} engines failed while they computed this request alone: it is not "
                "tried again; tell the operator its request_id",
                reason="SEQUENCE_BLAMED",
            )

    def _load_failed(self, runner_id: str, cause: SequenceFailure) -> None:
        """Raise the cause if there is no hope that another runner loads the adapter.

        A failed runner is avoided for a while. So it fails again only if no other runner had room.
        """
        again = runner_id in self._failed_loads
        self._failed_loads.add(runner_id)
        if again or len(self._failed_loads) >= _FATAL_LOADS:
            raise error_of(cause)


def error_of(failure: SequenceFailure) -> GranatumError:
    """The error that the client gets for a runner's failure message."""
    error = from_code(failure.code, failure.message, failure.reason, failure.field)
    if isinstance(error, Unavailable | Overloaded):
        error.retry_after_s = RETRY_AFTER_S
    return error
