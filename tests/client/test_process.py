"""Children: their logs, their ends, and that they never outlive their parent."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from granatum.client.process import Process

SLEEPER = (sys.executable, "-c", "import time; print('awake', flush=True); time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('awake', flush=True); time.sleep(600)",
)


async def test_a_log_is_followed_and_its_tail_shown(tmp_path: Path) -> None:
    program = "for i in range(100): print('line', i)"
    process = Process("p", (sys.executable, "-c", program), tmp_path / "p.log")
    await process.start()
    assert await process.logged("line 7") == "line 7"
    assert await process.wait() == 0
    assert not process.running
    assert process.tail().splitlines() == [f"line {i}" for i in range(80, 100)]


@pytest.mark.parametrize(
    ("command", "status"), [(SLEEPER, -signal.SIGTERM), (STUBBORN, -signal.SIGKILL)]
)
async def test_stop_asks_and_then_insists(
    tmp_path: Path, command: tuple[str, ...], status: int
) -> None:
    process = Process("p", command, tmp_path / "p.log")
    await process.start()
    await process.logged("awake")
    await process.stop(grace_s=0.5)
    assert await process.wait() == status
    await process.stop(grace_s=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's leash is Linux's")
async def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from granatum.client.process import Process

async def main():
    process = Process("p", {SLEEPER!r}, Path({str(tmp_path)!r}) / "p.log")
    await process.start()
    await process.logged("awake")
    print(process.pid, flush=True)
    await process.wait()

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    child.wait(timeout=10)
