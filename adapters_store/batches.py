"""Long lists, made while other tasks get turns."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_BATCH = 25
"""Items made before other tasks get a turn."""


class Batches:
    """Makes one list at a time, so that many long lists delay other tasks no more than one does."""

    def __init__(self) -> None:
        self._making = asyncio.Lock()

    async def made(self, make: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`make` of every item."""
        made = list[R]()
        async with self._making:
            for begin in range(0, len(items), _BATCH):
                await asyncio.sleep(0)
                made += map(make, items[begin : begin + _BATCH])
        return made
