"""What a hostile tenant does: `run` is the main of a process of its own."""

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from granatum.client.client import Client, Generation
from granatum.examples.tasks import ADAPTER_TASKS
from granatum.v1.errors import GranatumError

CHURN_PER_S = 100
UNREAD = 8
QUEUED = 500
QUEUED_TOKENS = 32
LONG_BYTES = 4_000_000
UPLOADS = 6
_PATTERNS = [f"(a|[^{chr(97 + i % 26)}b-y]*)*{'[!-~]?' * 150}$" for i in range(200)]

Attack = Callable[[Client, float], Awaitable[None]]


def run(name: str, address: str, key: str, seconds: float) -> None:
    """Attack for so many seconds."""

    async def attack() -> None:
        async with Client(address, key=key) as client:
            await ATTACKS[name](client, seconds)

    asyncio.run(attack())


async def churn(client: Client, seconds: float) -> None:
    """Generate and cancel, again and again."""
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        generation = client.generate("granite>", max_tokens=200, ignore_eos=True)
        task = asyncio.create_task(_read(generation))
        await asyncio.sleep((number % 5) / 1000)
        generation.cancel()
        await asyncio.gather(task, return_exceptions=True)
        number += 1
        await asyncio.sleep(max(0.0, end - seconds + number / CHURN_PER_S - time.monotonic()))


async def unread(client: Client, seconds: float) -> None:
    """Open streams as wide as can be, and read nothing but their first message."""
    opened = [
        client.generate("granite>", max_tokens=240, ignore_eos=True, logprobs=20)
        for _ in range(UNREAD)
    ]
    readers = [aiter(generation) for generation in opened]
    await asyncio.gather(*(anext(reader) for reader in readers), return_exceptions=True)
    await asyncio.sleep(seconds)


async def queue(client: Client, seconds: float) -> None:
    """Ask for far more than there is room for, at once."""
    asked = [
        client.complete("granite>", max_tokens=QUEUED_TOKENS, ignore_eos=True, timeout=seconds)
        for _ in range(QUEUED)
    ]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    print(Counter(type(outcome).__name__ for outcome in outcomes), flush=True)


async def patterns(client: Client, seconds: float) -> None:
    """Upload adapters whose patterns take long to match."""
    with TemporaryDirectory() as directory:
        folder = Path(directory) / "adapter"
        shutil.copytree(ADAPTER_TASKS[0].path, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["rank_pattern"] = dict.fromkeys(_PATTERNS, config["r"])
        (folder / "adapter_config.json").write_text(json.dumps(config))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            tries = (client.upload(f"hostile-{i}", folder) for i in range(UPLOADS))
            await asyncio.gather(*tries, return_exceptions=True)


async def long_prompts(client: Client, seconds: float) -> None:
    """Send prompts of 4 MB, one after another."""
    text = "granite copper " * (LONG_BYTES // 15)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            await client.complete(text, max_tokens=2)
        except GranatumError as error:
            await asyncio.sleep(error.retry_after_s or 0.05)


async def _read(generation: Generation) -> None:
    async for _ in generation:
        pass


ATTACKS: dict[str, Attack] = {
    "churn": churn,
    "unread": unread,
    "queue": queue,
    "patterns": patterns,
    "long prompts": long_prompts,
}
