"""Tasks that end with their owner."""

import asyncio
from typing import Any


async def cancelled(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel them and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
