"""Starts a process again whenever it ends, later and later if it does not last."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from granatum.cli.box.process import Process
from granatum.v1.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds between an end and the next start: `first`, doubled up to `longest`.

    A process that ran for `lasting` seconds begins with `first` again.
    """

    first: float = 0.5
    longest: float = 30.0
    lasting: float = 60.0


async def keep(process: Process, say: Callable[[str], None], pauses: Pauses) -> NoReturn:
    """Start a running process again, without end; say each end once.

    However often it ends, it is not given up: what ended it may be one request, or a server that
    will be back, and there is nobody else to start it.
    """
    pause, started = pauses.first, time.monotonic()
    while True:
        death = await process.death()
        if time.monotonic() - started >= pauses.lasting:
            pause = pauses.first
        say(f"{death.message}\n{process.name} starts again in {pause:g} s")
        await asyncio.sleep(pause)
        pause = min(2 * pause, pauses.longest)
        await _start(process, say, pauses)
        started = time.monotonic()


async def _start(process: Process, say: Callable[[str], None], pauses: Pauses) -> None:
    """Until it could be started: the disk may be full, or the machine out of processes."""
    said = ""
    while True:
        try:
            return await process.start()
        except Unavailable as error:
            if error.message != said:
                said = error.message
                say(said)
            await asyncio.sleep(pauses.longest)
