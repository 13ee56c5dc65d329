"""The whole service on one machine: Valkey, a router and its runners, as our child processes.

    async with Box(Layout(model=Path("llama"), state=Path("state")), say=print) as box:
        async with Client(box.address, key=box.keys["default"]) as client: ...

The box listens on loopback unless told otherwise. Its processes end with this process. While the
box starts, the end of any child is the end of the box. Afterwards every child that ends is started
again.
"""

import asyncio
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar

from granatum.cli.box import hardware
from granatum.cli.box.address import claim
from granatum.cli.box.children import Child, Inside, RouterChild, RunnerChild, ValkeyChild
from granatum.cli.box.keeper import Pauses, keep
from granatum.cli.box.layout import Layout
from granatum.cli.box.process import Process
from granatum.cli.box.state import held, make_private
from granatum.models.folder import model_folder
from granatum.router.services.keys_file import Identity, add
from granatum.v1.errors import InvalidRequest, Unavailable
from granatum.v1.transport import is_loopback

ADMIN = "admin"

_GRACE_S = 10.0
_REDIS_S = 5.0
_T = TypeVar("_T")


class Box:
    """A running service, inside `async with`.

    `address` is the router's. `keys` holds the new keys by tenant, and the admin's as `ADMIN`; it
    is empty if the state directory had keys already. `cluster_key` is the secret of router and
    runners.
    """

    runner: ClassVar[type[RunnerChild]] = RunnerChild

    def __init__(self, layout: Layout, say: Callable[[str], None]) -> None:
        self.layout = layout
        self.address = layout.listen
        self.keys: dict[str, str] = {}
        self.cluster_key = secrets.token_urlsafe(32)
        self._say = say
        self._children: list[Child] = []
        self._held = ExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def watch(self) -> None:
        """Start again what ends, without end."""
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(keep(child, self._say, Pauses()))

    async def during(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns. Meanwhile every child that ends is started again."""
        return await _guarded(work, self.watch())

    async def _start(self) -> None:
        place = self._prepare()
        with ExitStack() as unseen:  # deletes new keys that nobody will get to see
            await self._make_keys(unseen)
            redis = self.layout.redis or await self._start_valkey(place)
            address = claim("127.0.0.1:0") if self.layout.needs_loopback else self.address
            inside = Inside(address, redis, self.cluster_key)
            await self._start_router(inside)
            await self._start_runners(inside)
            unseen.pop_all()

    def _prepare(self) -> Path:
        """Take what the box needs; a folder for the embedded server's socket."""
        layout = self.layout
        model_folder(layout.model)
        self._held.enter_context(held(layout.state, f"process {os.getpid()} on {layout.listen}"))
        for directory in (layout.log_directory, *layout.own_store):
            make_private(directory)
        self.address = claim(layout.listen)
        if layout.tls is None and not layout.insecure and not is_loopback(self.address):
            raise InvalidRequest(
                f"{self.address} is beyond this machine: give --tls-cert and --tls-key, "
                "or ask for plaintext by name with --insecure"
            )
        return Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="granatum-")))

    async def _make_keys(self, unseen: ExitStack) -> None:
        file = self.layout.keys_file
        if file.exists():
            return
        unseen.callback(file.unlink, missing_ok=True)
        for tenant in self.layout.tenants:
            self.keys[tenant] = await asyncio.to_thread(add, file, Identity(tenant))
        self.keys[ADMIN] = await asyncio.to_thread(add, file, Identity(None))

    async def _start_valkey(self, place: Path) -> str:
        valkey = ValkeyChild(self.layout, place)
        await self._begin(valkey)
        await self._alive(valkey.serves())
        self._say(f"valkey    listens on {valkey.url}")
        return valkey.url

    async def _start_router(self, inside: Inside) -> None:
        router = RouterChild(self.layout, self.address, inside)
        await self._begin(router)
        await self._alive(router.listens())
        await self._alive(self._until_redis_answers(router, inside.redis))
        self._say(f"router    serves on {self.address}")

    async def _until_redis_answers(self, router: RouterChild, redis: str) -> None:
        try:
            async with asyncio.timeout(_REDIS_S):
                await router.serves()
        except TimeoutError:
            raise Unavailable(
                f"{_without_secrets(redis)} does not answer as a Redis server should: "
                "start one there, or leave --redis out for an embedded one"
            ) from None

    async def _start_runners(self, inside: Inside) -> None:
        devices = hardware.devices() or ("cpu",)
        number = self.layout.runners or len(devices)
        threads = hardware.cores() // number or 1
        runners = [
            self.runner(self.layout, inside, f"runner-{i}", devices[i % len(devices)], threads)
            for i in range(number)
        ]
        for runner in runners:
            await self._begin(runner)
            self._say(f"{runner.name}  loads {self.layout.model.name}")
        await self._alive(_all(map(self._until_runner_serves, runners)))

    async def _until_runner_serves(self, runner: RunnerChild) -> None:
        began = time.monotonic()
        await runner.serves()
        self._say(f"{runner.name}  serves after {time.monotonic() - began:.1f} s")

    async def _begin(self, child: Child) -> None:
        self._children.append(child)
        await child.start()

    async def _alive(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns; ProcessDied if one of our processes ends before."""
        return await _guarded(work, _all(map(_until_death, self._children)))

    async def _stop(self) -> None:
        """Stop the router first, while its streams have runners to end on, and Valkey last."""
        for kind in (RouterChild, RunnerChild, ValkeyChild):
            ours = [child for child in self._children if isinstance(child, kind)]
            await asyncio.gather(*(child.stop(_GRACE_S) for child in ours))
        self._held.close()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; the first error ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(part)
    except* Unavailable as errors:
        raise errors.exceptions[0] from None


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
