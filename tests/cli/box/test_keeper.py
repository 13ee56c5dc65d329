"""What ends is started again, however often it ends."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from granatum.cli.box.children import Child
from granatum.cli.box.keeper import Pauses, keep

POISONED = (sys.executable, "-ISc", "print('poison', flush=True); raise SystemExit(1)")
SLEEPER = (sys.executable, "-ISc", "import time; time.sleep(600)")


class Kept(Child):
    """A process that serves once it is told to be ready."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        super().__init__(name, command, log)
        self.ready = asyncio.Event()

    async def serves(self) -> None:
        await self.ready.wait()


@asynccontextmanager
async def kept(
    process: Child, say: Callable[[str], None], pauses: Pauses
) -> AsyncIterator[asyncio.Task[None]]:
    """The process, started and kept running meanwhile."""
    await process.start()
    keeping: asyncio.Task[None] = asyncio.create_task(keep(process, say, pauses))
    try:
        yield keeping
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await process.stop(grace_s=5)


async def test_a_process_that_never_lasts_is_not_given_up_and_each_end_is_said_once(
    tmp_path: Path,
) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    process = Kept("p", POISONED, tmp_path / "p.log")
    async with kept(process, said.put_nowait, Pauses(0.01, 0.04, 60)) as keeping:
        async with asyncio.timeout(30):
            ends = [await said.get() for _ in range(5)]
        assert not keeping.done()
    pauses = [end.rsplit(" in ", 1)[1] for end in ends]
    assert pauses == ["0.01 s", "0.02 s", "0.04 s", "0.04 s", "0.04 s"]
    assert all(end.count("poison") == 1 for end in ends), "the end of this start's log"


async def test_one_that_lasted_starts_again_at_once(tmp_path: Path) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    process = Kept("p", POISONED, tmp_path / "p.log")
    async with kept(process, said.put_nowait, Pauses(0.01, 10, lasting=0)), asyncio.timeout(30):
        ends = [await said.get() for _ in range(3)]
    assert all(end.endswith("in 0.01 s") for end in ends)


async def test_one_that_serves_again_is_said_to(tmp_path: Path) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    process = Kept("p", SLEEPER, tmp_path / "p.log")
    async with kept(process, said.put_nowait, Pauses(0.01, 0.05, 60)), asyncio.timeout(30):
        await process.stop(grace_s=5)
        assert "p ended" in await said.get()
        while not process.running:
            await asyncio.sleep(0.01)
        await process.stop(grace_s=5)
        assert "p ended" in await said.get(), "it ended before it served"
        process.ready.set()
        assert (await said.get()).startswith("p serves again after ")
        assert process.running


async def test_a_start_that_fails_is_tried_again(tmp_path: Path) -> None:
    """As on a disk that is full for a while."""
    said: asyncio.Queue[str] = asyncio.Queue()
    logs = tmp_path / "logs"
    logs.mkdir()
    process = Kept("p", SLEEPER, logs / "p.log")
    async with kept(process, said.put_nowait, Pauses(0.01, 0.05, 60)), asyncio.timeout(30):
        logs.rename(tmp_path / "away")
        await process.stop(grace_s=5)
        assert "p ended" in await said.get()
        assert "p cannot start" in await said.get()
        (tmp_path / "away").rename(logs)
        while not process.running:
            await asyncio.sleep(0.01)
        assert said.empty()
