"""Which sequences the device computes, for the front to read once the engine has died. No torch.

    shared memory, for each of two steps:  [number of ids][id][id]...

The front makes the recorder and hands it to the engine's process. The engine begins a step in the
recorder before the launch, and ends it when the results are there. Steps end in the order of their
launches.
"""

from multiprocessing import RawArray

_STEPS = 2
"""The most steps in flight at a time."""


class FlightRecorder:
    """Ids of the sequences of the steps in flight, of up to `max_batch` sequences each."""

    def __init__(self, max_batch: int) -> None:
        self._steps = [RawArray("q", 1 + max_batch) for _ in range(_STEPS)]
        self._begun = 0
        self._ended = 0

    def begin(self, ids: list[int]) -> None:
        """A step that computes the sequences `ids` is launched next."""
        step = self._steps[self._begun % _STEPS]
        self._begun += 1
        step[1 : 1 + len(ids)] = ids
        step[0] = len(ids)  # last: a death between these lines leaves no wrong ids

    def end(self) -> None:
        """The oldest step has ended."""
        self._steps[self._ended % _STEPS][0] = 0
        self._ended += 1

    def read(self) -> tuple[int, ...]:
        """The ids of all steps in flight, each once; front and engine may both read them."""
        noted = [i for step in self._steps for i in step[1 : 1 + step[0]]]
        return tuple(dict.fromkeys(noted))
