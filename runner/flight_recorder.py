"""What the engine computes just now, in memory that outlives the engine's process."""

import ctypes
import multiprocessing
from collections.abc import Iterable
from itertools import islice

_MOST = 4096
"""More sequences than any step has."""


class FlightRecorder:
    """The engine's ids of the sequences in its steps under way. Made by the front, for both."""

    def __init__(self) -> None:
        self._count = multiprocessing.RawValue(ctypes.c_uint64, 0)
        self._ids = multiprocessing.RawArray(ctypes.c_uint64, _MOST)

    def note(self, ids: Iterable[int]) -> None:
        """These are computed from now on."""
        noted: list[ctypes.c_uint64 | int] = []
        noted += islice(ids, _MOST)
        self._count.value = 0  # a process that ends amid this has noted nothing
        self._ids[: len(noted)] = noted
        self._count.value = len(noted)

    def clear(self) -> None:
        """Nothing is computed."""
        self._count.value = 0

    def read(self) -> tuple[int, ...]:
        """What was noted last."""
        return tuple(self._ids[: self._count.value])
