"""Starts a process again whenever it ends. The pauses grow while the process does not last."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from granatum.cli.box.children import Child
from granatum.cli.box.process import ProcessDied
from granatum.v1.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds between an end and the next start: `first`, doubled up to `longest`.

    A process that ran for `lasting` seconds begins with `first` again.
    """

    first: float = 0.5
    longest: float = 30.0
    lasting: float = 60.0


async def keep(process: Child, say: Callable[[str], None], pauses: Pauses) -> NoReturn:
    """Start a running process again, without end; say each end, and when it serves again.

    A process is never given up, however often it ends. One request may have ended it, or a server
    that will be back, and nobody else would start it.
    """
    pause, started = pauses.first, time.monotonic()
    death = await process.death()
    while True:
        if time.monotonic() - started >= pauses.lasting:
            pause = pauses.first
        say(f"{death.message}\n{process.name} starts again in {pause:g} s")
        await asyncio.sleep(pause)
        pause = min(2 * pause, pauses.longest)
        await _start(process, say, pauses)
        started = time.monotonic()
        death = await _next_death(process, say)


async def _next_death(process: Child, say: Callable[[str], None]) -> ProcessDied:
    """How a process that was just started ends. Until then this says when the process serves."""

    async def tell() -> None:
        began = time.monotonic()
        await process.serves()
        say(f"{process.name} serves again after {time.monotonic() - began:.1f} s")

    telling = asyncio.create_task(tell())
    try:
        return await process.death()
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _start(process: Child, say: Callable[[str], None], pauses: Pauses) -> None:
    """Start a process. While the disk is full, or the machine out of processes, try again."""
    said = ""
    while True:
        try:
            return await process.start()
        except Unavailable as error:
            if error.message != said:
                said = error.message
                say(said)
            await asyncio.sleep(pauses.longest)
