"""Keeps an engine at work: says what the end of one means, and starts the next."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Protocol

import structlog

from granatum.runner.channel import AsyncChannel
from granatum.runner.front.engine_end import EngineEnd
from granatum.runner.front.front import Front
from granatum.runner.records import Command, EngineFault, Report
from granatum.service.tasks import cancelled
from granatum.v1.errors import PreconditionFailed

GRACE_S = 5.0
"""From an engine's last word, or the end of its channel, to the end of its process."""
_TURN_S = 0.25
_SURE_TURNS = 2
"""Turns of our own loop in which it stays silent: it was not this process that stood still."""
_HUNG_S = 60.0
"""An engine that is silent for so long is ended."""
_START_S = 120.0
"""A later engine that takes longer to start hangs, unless an earlier one took a quarter of that."""
_LASTING_S = 10.0
"""An engine that serves for less was as good as never started."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0

log = structlog.get_logger(__name__)


class Child(Protocol):
    """An engine's process."""

    async def connect(self) -> AsyncChannel[Command, Report]:
        """The front's end of its channel."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    async def ended(self, grace_s: float) -> EngineEnd:
        """How it ended; it is killed if it does not end within the grace."""
        ...


class EngineKeeper:
    """Runs the engine `child` for `front`, which is connected to it, and those that `start` starts.

    An engine that is lost takes no stream with it: the front gives them back, and the next engine
    starts in its place.
    """

    def __init__(self, front: Front, child: Child, start: Callable[[], Child]) -> None:
        self._front = front
        self._child = child
        self._start = start
        self._proven = False
        """Whether an engine was ever ready."""
        self._served_s = 0.0
        self._start_s = _START_S
        self._pause_s = _FIRST_PAUSE_S

    async def run(self) -> None:
        """Keep an engine at work. Raises PreconditionFailed if the first one cannot start."""
        while True:
            end = await self._serve()
            self._proven = self._proven or self._front.loaded.is_set()
            self._front.lose(end.departure_of)
            if not self._proven:
                raise PreconditionFailed(f"the engine cannot start: {end}")
            log.error("engine lost", why=str(end), status=end.status, sequences=len(end.step))
            if self._served_s >= _LASTING_S:
                self._pause_s = _FIRST_PAUSE_S
            self._child = await self._next()
            self._front.attach(await self._child.connect())

    async def ended(self, grace_s: float) -> EngineEnd:
        """How the last engine ended, once `run` is over; it is killed after the grace."""
        return await self._child.ended(grace_s)

    async def _serve(self) -> EngineEnd:
        """Let the front and the engine work until the engine is gone."""
        relay = asyncio.create_task(self._front.run(), name="relay")
        watch = asyncio.create_task(self._watch(), name="watch")
        try:
            await asyncio.wait({relay, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not relay.done():
                self._child.kill()
            fault = await self._last_word(relay)
        finally:
            await cancelled(relay, watch)
        end = await self._child.ended(GRACE_S)
        if fault is None:
            return end
        step = fault.sequences or end.step
        return dataclasses.replace(end, step=step, cause=fault.message, own=True)

    async def _last_word(self, relay: "asyncio.Task[EngineFault | None]") -> EngineFault | None:
        try:
            return await relay
        except Exception as error:
            log.error("what the engine reports cannot be read", exc_info=error)
            self._child.kill()
            return None

    async def _watch(self) -> None:
        """Have the front give up an engine that is silent; returns once there is no more hope."""
        self._served_s, turns = 0.0, 0
        if not await self._starts():
            return
        while turns * _TURN_S < _HUNG_S:
            await asyncio.sleep(_TURN_S)
            if not self._front.is_stale():
                if turns >= _SURE_TURNS:
                    log.warning("the engine reports again", silent_s=turns * _TURN_S)
                turns = 0
                self._served_s += _TURN_S
                continue
            turns += 1
            if turns == _SURE_TURNS:
                log.error("the engine is silent: its sequences go elsewhere")
                self._front.hang()

    async def _starts(self) -> bool:
        """Wait until the engine is ready; False if a later one takes too long."""
        turns = 0
        while not self._front.loaded.is_set():
            if self._proven and turns * _TURN_S > self._start_s:
                log.error("the engine does not start", seconds=turns * _TURN_S)
                return False
            await asyncio.sleep(_TURN_S)
            turns += 1
        self._start_s = max(self._start_s, 4 * turns * _TURN_S)
        return True

    async def _next(self) -> Child:
        """Another engine, after a pause that grows while none of them lasts."""
        while True:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            log.info("starting another engine")
            try:
                return self._start()
            except OSError as error:
                log.error("the engine's process cannot start", error=str(error))
