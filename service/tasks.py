"""Tasks that end with their owner, and work that outlasts its own failures."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

_PAUSE_S = 1.0

log = structlog.get_logger(__name__)


async def cancelled(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel the tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def keep_up(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Do `work` until cancelled; if it fails, log the failure and begin again after a second.

    One bad answer of a server, or one bad object in a store, must not end a process.
    """
    while True:
        try:
            await work()
            return
        except Exception:
            log.exception("background work failed, begins again", work=name, pause_s=_PAUSE_S)
        await asyncio.sleep(_PAUSE_S)


def stop_signal() -> asyncio.Event:
    """An event that is set when SIGTERM or SIGINT asks this process to stop."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped


async def serve_until(stopped: asyncio.Event, *parts: "asyncio.Task[Any]") -> None:
    """Wait until `stopped` is set, or until a part ends; raises the part's error."""
    stopping = asyncio.create_task(stopped.wait())
    try:
        done, _ = await asyncio.wait({stopping, *parts}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled(stopping)
    for part in done - {stopping}:
        await part
