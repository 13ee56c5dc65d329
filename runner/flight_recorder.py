"""Which sequences the device computes, for whoever finds the engine's process dead. No torch.

    shared memory:  [number of ids][id][id]...

The front makes the recorder and hands it to the engine's process, which writes before each launch.
"""

from collections.abc import Iterable
from multiprocessing import RawArray

MOST = 1024
"""The largest batch that a runner can be given."""


class FlightRecorder:
    """Ids of the sequences of the steps in flight, of up to two steps of `max_batch` sequences."""

    def __init__(self, max_batch: int = MOST) -> None:
        self._cells = RawArray("q", 1 + 2 * max_batch)

    def note(self, ids: Iterable[int]) -> None:
        """These are computed from now on, and no others."""
        noted = [*ids][: len(self._cells) - 1]
        self._cells[0] = 0  # whoever dies while the ids are written leaves none, not wrong ones
        self._cells[1 : 1 + len(noted)] = noted
        self._cells[0] = len(noted)

    def clear(self) -> None:
        """Nothing is computed."""
        self._cells[0] = 0

    def read(self) -> tuple[int, ...]:
        """What was noted last."""
        return tuple(self._cells[1 : 1 + self._cells[0]])
