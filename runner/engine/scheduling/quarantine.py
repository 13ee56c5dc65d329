"""Which sequences are computed in steps of their own, and whose turn it is. No torch.

A step that failed says that one of its sequences may be at fault, but not which one. So each of
them becomes a suspect: it is computed in steps of its own until it has passed enough of them. A
step of one sequence that fails names the culprit.
"""

import math
from collections.abc import Iterable

from granatum.runner.engine.scheduling.sequence import Sequence

TRIALS = (0, 16)
"""How many steps of its own a sequence must pass. Index: how often other engines suspected it.

A sequence that was suspected more often has steps of its own for good.
"""
LOCAL_TRIALS = (0, 1, 16)
"""How many steps of its own a sequence must pass. Index: how often its steps failed here.

The first failure asks for one step only, because it makes a suspect of every sequence in the batch.
"""


class Quarantine:
    """Sequences under suspicion, by id, and how many steps of its own each has yet to pass.

    `has_turn`: whether the next step belongs to a suspect, if one can run. Suspects and all others
    take turns, so that neither side waits for the other side's end.
    """

    def __init__(self) -> None:
        self.has_turn = True
        self._left: dict[int, float] = {}  # who has waited longest comes first
        self._faults: dict[int, int] = {}

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._left

    def admit(self, sequence_id: int, suspicion: int) -> None:
        """Take in a sequence; `suspicion`: how often other engines suspected it."""
        if suspicion > 0:
            self._left[sequence_id] = _trials(TRIALS, suspicion)

    def suspect(self, sequence_id: int) -> None:
        """A step failed that computed this sequence among others."""
        faults = self._faults[sequence_id] = self._faults.get(sequence_id, 0) + 1
        left = self._left.get(sequence_id, 0)
        self._left[sequence_id] = max(left, _trials(LOCAL_TRIALS, faults))

    def acquit(self, sequence_id: int) -> None:
        """The sequence passed a step of its own; it goes behind the other suspects."""
        left = self._left.pop(sequence_id, 0) - 1
        if left > 0:
            self._left[sequence_id] = left

    def forget(self, sequence_id: int) -> None:
        """The sequence is gone."""
        self._left.pop(sequence_id, None)
        self._faults.pop(sequence_id, None)

    def company(self, running: list[Sequence]) -> list[Sequence]:
        """The sequences of `running` that are under no suspicion."""
        if not self._left:
            return running
        return [sequence for sequence in running if sequence.id not in self._left]

    def in_turn(self, running: Iterable[Sequence]) -> list[Sequence]:
        """The suspects among `running`; who has waited longest comes first."""
        if not self._left:
            return []
        by_id = {sequence.id: sequence for sequence in running}
        return [by_id[i] for i in self._left if i in by_id]


def _trials(trials: tuple[int, ...], times: int) -> float:
    return trials[times] if times < len(trials) else math.inf
