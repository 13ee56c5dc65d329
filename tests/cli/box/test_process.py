"""Children: their logs, their ends, and that they never outlive their parent."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from granatum.cli.box.process import Process
from granatum.v1.errors import Unavailable

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


async def ended(tmp_path: Path, program: str) -> Process:
    """A child that has run that program."""
    process = Process("p", (sys.executable, "-ISc", program), tmp_path / "p.log")
    await process.start()
    await process.wait()
    return process


async def test_a_tail_is_fit_for_a_terminal_whatever_was_logged(tmp_path: Path) -> None:
    odd = r"b'\xff\x1b[2J[/bold]\ttab\n' + b'x' * 3_000_000 + b'\nlast'"
    process = await ended(tmp_path, f"import os; os.write(1, {odd})")
    *_, huge, last = process.tail().splitlines()
    assert last == "last"
    assert len(huge) < 1000
    process = await ended(tmp_path, r"import os; os.write(1, b'\xff\x1b[2J[/bold]\ttab\r\n')")
    assert process.tail() == "\ufffd\ufffd[2J[/bold] tab", "and of this start alone"


async def test_a_line_longer_than_memory_hides_none_that_follow(tmp_path: Path) -> None:
    process = await ended(tmp_path, "print('x' * 3_000_000); print('found me')")
    assert await process.logged("found") == "found me"


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ('{"event": "cannot serve", "error": "no room: free some"}', "no room: free some"),
        ('{"error": "first"}\n{"event": "x", "error": "second"}\nrest', "second"),
        (
            '{"event": "wrong settings", "wrong": ["--a: bad", "--b: worse"]}',
            "--a: bad; --b: worse",
        ),
        ("Traceback\nValueError: x", "ValueError: x"),
        ('{"error": ""}\nplain', "plain"),
        ('{"error"', '{"error"'),
        ('{"a": ' * 2000, '{"a": ' * 83 + '{" ...'),
    ],
)
async def test_a_death_ends_with_its_cause(tmp_path: Path, log: str, last: str) -> None:
    process = await ended(tmp_path, f"print({log!r}); raise SystemExit(3)")
    first, *_, cause = (await process.death()).message.splitlines()
    assert first.startswith("p ended with status 3")
    assert str(process.log) in first
    assert cause == last


async def test_a_child_that_is_killed_has_no_cause_of_its_own(tmp_path: Path) -> None:
    program = """if True:
        import os, signal
        print('{"error": "long ago"}', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = await ended(tmp_path, program)
    message = (await process.death()).message
    assert "by signal 9" in message
    assert message.endswith('{"error": "long ago"}'), "the log as it is, no claim"


async def test_what_a_child_writes_is_private(tmp_path: Path) -> None:
    written = tmp_path / "written"
    process = await ended(tmp_path, f"open({str(written)!r}, 'w').close()")
    for file in (written, process.log):
        assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("log", ["nowhere/p.log", "."])
async def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path, log: str) -> None:
    process = Process("p", SLEEPER, tmp_path / log)
    with pytest.raises(Unavailable, match="p cannot start"):
        await process.start()
    assert not process.running


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
from granatum.cli.box.process import Process

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
