"""`granatum up`, as a user runs it, from the first start to the last child's end."""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from certificates import LOCALHOST, Authority
from doubles import Service

from granatum.cli.box.box import Box
from granatum.cli.box.layout import Layout
from granatum.cli.box.process import ProcessDied
from granatum.client import Client
from granatum.examples import tasks
from granatum.v1.errors import GranatumError, Unavailable
from granatum.v1.transport import Tls

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

START_S = 100.0
WORD, TASK = "granite", tasks.ADAPTER_TASKS[0]


async def start(state: Path, *more: str) -> tuple[asyncio.subprocess.Process, str]:
    """`granatum up` on the example model, once it has said how to talk to it; what it said."""
    up = await spawn(state, *(more or ("--listen", "127.0.0.1:0")))
    assert up.stdout is not None
    said = ""
    async with asyncio.timeout(START_S):
        while "granatum generate" not in said:
            line = (await up.stdout.readline()).decode()
            assert line, said
            said += line
    return up, said


async def spawn(state: Path, *more: str) -> asyncio.subprocess.Process:
    arguments = ("--model", str(tasks.BASE_MODEL), "--state", str(state), *more)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "granatum.cli", "up", *arguments, "--", "--max-batch", "4"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200"},
    )


async def heard(up: asyncio.subprocess.Process, text: str) -> None:
    """Return once it says so."""
    assert up.stdout is not None
    async with asyncio.timeout(START_S):
        while text not in (line := (await up.stdout.readline()).decode()):
            assert line, "it ended"


async def stopped(up: asyncio.subprocess.Process) -> None:
    """Ask it to end, and see that everything ends with it."""
    children = family(up)
    up.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(up.wait(), 60) == 0
    assert not survivors(children)


def family(up: asyncio.subprocess.Process) -> list[psutil.Process]:
    """Every process below it: Valkey, router, runner, engine."""
    children = psutil.Process(up.pid).children(recursive=True)
    assert len(children) >= 4
    return children


async def runner(up: asyncio.subprocess.Process) -> psutil.Process:
    """The runner's front, once it is there."""
    async with asyncio.timeout(30):
        while True:
            for child in psutil.Process(up.pid).children():
                if "granatum.runner" in child.cmdline() and "_LEASH" not in child.cmdline():
                    return child
            await asyncio.sleep(0.02)


def open_to_others(state: Path) -> list[Path]:
    """What a box made there and others than its owner may read."""
    return [path for path in state.rglob("*") if path.lstat().st_mode & 0o077]


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
        for _ in range(3):  # as under a request that ends every runner that tries it
            (await runner(up)).kill()
            await asyncio.sleep(0.1)
        again = await client.complete(TASK.prompt(WORD), stop=(TASK.stop,), max_tokens=64)
        assert again.text == tasks.BASE.expected(WORD), "a runner that dies is started again"
        await heard(up, "runner-0 serves again after ")
        assert up.returncode is None
    assert not open_to_others(tmp_path)
    other = await spawn(tmp_path, "--listen", "127.0.0.1:0")
    told, _ = await asyncio.wait_for(other.communicate(), 30)
    assert other.returncode == 1
    assert f"in use by another granatum up (process {up.pid} on" in told.decode()
    await stopped(up)

    up, said = await start(tmp_path)
    assert not re.search(r"gk-\w+", said), "keys are shown once"
    (address,) = re.findall(r"--address (\S+)", said)
    async with Client(address, key=key, timeout=60) as client:
        assert [adapter.name for adapter in await client.list_adapters()] == [TASK.name]
    children = family(up)
    up.kill()
    await up.wait()
    assert not survivors(children)


async def test_beyond_this_machine_a_box_serves_with_any_certificate(tmp_path: Path) -> None:
    """Its runners do not come that way, so the certificate need not name 127.0.0.1."""
    tls = Authority(tmp_path / "tls").issue("router", LOCALHOST)
    files = ("--tls-cert", str(tls.cert), "--tls-key", str(tls.key))
    up, said = await start(tmp_path / "state", "--listen", "0.0.0.0:0", *files)
    (port,) = re.findall(r"--address \S+:(\d+) --tls-ca", said)
    (key,) = re.findall(r"tenant +key (\S+)", said)
    async with Client(f"localhost:{port}", key=key, tls=Tls(ca=tls.ca), timeout=60) as client:
        completion = await client.complete(TASK.prompt(WORD), stop=(TASK.stop,), max_tokens=64)
        assert completion.text == tasks.BASE.expected(WORD)
    await stopped(up)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_that_another_granatum_has_is_said_and_leaves_no_keys(
    host: str, service: Service, tmp_path: Path
) -> None:
    """The other one answers health checks, and is not taken for the box's own router."""
    address = f"{host}:{service.address.rpartition(':')[2]}"
    up = await spawn(tmp_path, "--listen", address)
    told, _ = await asyncio.wait_for(up.communicate(), 30)
    assert up.returncode == 1
    assert told.decode().startswith(f"granatum: {address} is taken by another process")
    assert "--listen" in told.decode()
    assert not (tmp_path / "keys.json").exists()


async def test_a_router_that_cannot_listen_ends_the_start(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process takes the port after it was seen to be free."""
    monkeypatch.setattr("granatum.cli.box.box.claim", lambda address: address)
    layout = Layout(tasks.BASE_MODEL, tmp_path / "state", listen=service.address)
    said: list[str] = []
    with pytest.raises(ProcessDied, match=f"cannot listen on {service.address}") as caught:
        async with Box(layout, said.append):
            pass
    assert "router.log" in caught.value.message
    assert not any("router" in line for line in said)
    assert not layout.keys_file.exists()


@pytest.mark.parametrize("redis", ["redis://me:secret@127.0.0.1:1/0", "redis://{silent}/0"])
async def test_a_redis_that_does_not_answer_is_said_soon(redis: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = redis.format(silent=f"127.0.0.1:{silent.getsockname()[1]}")
        layout = Layout(tasks.BASE_MODEL, tmp_path / "state", redis=url)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"does not answer.*--redis") as caught:
            async with Box(layout, print):
                pass
    assert time.monotonic() - began < 15
    assert "secret" not in caught.value.message
    assert not layout.keys_file.exists()


async def test_a_runner_that_cannot_start_ends_up_with_its_cause(tmp_path: Path) -> None:
    layout = Layout(tasks.BASE_MODEL, tmp_path / "state", runner_arguments=("--max-batch", "0"))
    with pytest.raises(ProcessDied) as caught:
        async with Box(layout, print):
            pass
    first, *_, cause = caught.value.message.splitlines()
    assert str(layout.log_directory / "runner-0.log") in first
    assert cause.startswith("--max-batch: ")
    assert not layout.keys_file.exists()


async def test_a_state_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "adapters").touch()
    with pytest.raises(GranatumError, match="cannot be written") as caught:
        async with Box(Layout(tasks.BASE_MODEL, tmp_path), print):
            pass
    assert len(caught.value.message.splitlines()) == 1
    assert not (tmp_path / "keys.json").exists()
