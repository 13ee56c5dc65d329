"""`granatum up`, as a user runs it, from the first start to the last child's end."""

import asyncio
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from granatum.client import Client
from granatum.examples import tasks

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

START_S = 100.0
WORD, TASK = "granite", tasks.ADAPTER_TASKS[0]


async def start(state: Path) -> tuple[asyncio.subprocess.Process, str]:
    """`granatum up` on the example model, once it has said how to talk to it; what it said."""
    arguments = ("--model", str(tasks.BASE_MODEL), "--state", str(state), "--listen", "127.0.0.1:0")
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "granatum.client", "up", *arguments, "--", "--max-batch", "4"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert up.stdout is not None
    said = ""
    async with asyncio.timeout(START_S):
        while "granatum generate" not in said:
            line = (await up.stdout.readline()).decode()
            assert line, said
            said += line
    return up, said


def family(up: asyncio.subprocess.Process) -> list[psutil.Process]:
    """Every process below it: Valkey, router, runner, engine."""
    children = psutil.Process(up.pid).children(recursive=True)
    assert len(children) >= 4
    return children


def runner(up: asyncio.subprocess.Process) -> psutil.Process:
    """The runner's front."""
    (found,) = (c for c in psutil.Process(up.pid).children() if "granatum.runner" in c.cmdline())
    return found


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=20)[1]


async def test_a_box_serves_keeps_its_state_and_leaves_nothing_running(tmp_path: Path) -> None:
    up, said = await start(tmp_path)
    (address,) = re.findall(r"--address (\S+)", said)
    (key,) = re.findall(r"tenant +key (\S+)", said)
    assert key not in (tmp_path / "keys.json").read_text()
    async with Client(address, key=key, timeout=60) as client:
        await client.upload(TASK.name, TASK.path)
        completion = await client.complete(
            TASK.prompt(WORD), adapter=TASK.name, stop=(TASK.stop,), max_tokens=64
        )
        assert completion.text == TASK.expected(WORD)
        runner(up).kill()
        again = await client.complete(TASK.prompt(WORD), stop=(TASK.stop,), max_tokens=64)
        assert again.text == tasks.BASE.expected(WORD), "a runner that dies is started again"
    children = family(up)
    up.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(up.wait(), 60) == 0
    assert not survivors(children)

    up, said = await start(tmp_path)
    assert not re.search(r"gk-\w+", said), "keys are shown once"
    (address,) = re.findall(r"--address (\S+)", said)
    async with Client(address, key=key, timeout=60) as client:
        assert [adapter.name for adapter in await client.list_adapters()] == [TASK.name]
    children = family(up)
    up.kill()
    await up.wait()
    assert not survivors(children)
