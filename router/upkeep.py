"""Background work that outlasts its own failures."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

_PAUSE_S = 1.0

log = structlog.get_logger(__name__)


async def keep_up(work: Callable[[], Awaitable[None]], name: str) -> None:
    """Do `work` until cancelled; should it fail, say so and begin it again after a second.

    One bad answer of a server, or one bad object in a store, must not end a router.
    """
    while True:
        try:
            await work()
            return
        except Exception:
            log.exception("background work failed, begins again", work=name, pause_s=_PAUSE_S)
        await asyncio.sleep(_PAUSE_S)
