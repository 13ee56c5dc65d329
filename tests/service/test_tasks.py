"""Background work, and the wait for the end of a process."""

import asyncio
import os
import signal

import pytest

from granatum.service import tasks
from granatum.service.tasks import cancelled, keep_up, serve_until, stop_signal


async def test_background_work_begins_again_after_a_failure_and_stops_when_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_PAUSE_S", 0.001)
    begun = 0
    works = asyncio.Event()

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise ValueError("a stray object")
        works.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(keep_up(work, "work"))
    await asyncio.wait_for(works.wait(), 5)
    assert begun == 3
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_wait_and_leaves_the_parts_running(number: int) -> None:
    stopped = stop_signal()
    part = asyncio.create_task(asyncio.Event().wait())
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
    await asyncio.wait_for(serve_until(stopped, part), 5)
    assert not part.done()
    await cancelled(part)
    assert part.cancelled()


async def test_a_part_that_fails_ends_the_wait_with_its_error() -> None:
    async def fail() -> None:
        raise LookupError("this part")

    lasting = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(LookupError, match="this part"):
        await asyncio.wait_for(
            serve_until(asyncio.Event(), lasting, asyncio.create_task(fail())), 5
        )
    await cancelled(lasting)
