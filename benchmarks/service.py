"""The whole service on this machine, with random weights and random adapters, and its users."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from latencies import Record
from model_directory import write_adapter
from stream_users import PastRouter, ThroughRouter, Work, drive
from traffic import Request, Users

from granatum.cli.box.box import ADMIN, Box
from granatum.cli.box.layout import Layout
from granatum.client.client import Client
from granatum.models.base_model import BaseModel

_TENANT = "bench"
_UPLOADS = 4
"""At a time."""
_POLL_S = 0.1
_AHEAD_S = 0.5
"""In which every process gets ready."""


@dataclass(frozen=True)
class ServiceSize:
    """What to start, with which adapters."""

    model: Path
    vocab: int
    rank: int
    adapters: int
    runner_arguments: tuple[str, ...]


@dataclass(frozen=True)
class Service:
    """A running service and the processes of its users."""

    through: ThroughRouter
    past: PastRouter
    vocab: int
    processes: Executor
    clients: int
    """Processes that users are spread over."""
    start_s: float
    upload_s: tuple[float, ...]

    def drive(self, users: Users, seconds: float | None = None) -> list[Record]:
        """The users' records."""
        return self._join(self._spread(users, seconds))

    def drive_past(self, users: Users, seconds: float | None = None) -> list[Record]:
        """The same past the router, all in one process."""
        begin = time.monotonic() + _AHEAD_S
        return self.processes.submit(drive, self._past(users, begin, seconds)).result()

    def drive_twin(
        self, users: Users, twin: Request, seconds: float
    ) -> tuple[list[Record], Record]:
        """The users' records, and that of one request past the router at the same time."""
        begin = time.monotonic() + _AHEAD_S
        beside = self.processes.submit(drive, self._past(((twin,),), begin, seconds))
        records = self._join(self._spread(users, seconds, begin))
        (record,) = beside.result()
        return records, record

    def _spread(
        self, users: Users, seconds: float | None, begin: float | None = None
    ) -> list[Future[list[Record]]]:
        numbered = tuple(enumerate(users))
        begin = begin or time.monotonic() + _AHEAD_S
        parts = [numbered[i :: self.clients] for i in range(self.clients)]
        return [
            self.processes.submit(drive, Work(self.through, part, self.vocab, begin, seconds))
            for part in parts
            if part
        ]

    def _join(self, parts: list[Future[list[Record]]]) -> list[Record]:
        return [record for part in parts for record in part.result()]

    def _past(self, users: Users, begin: float, seconds: float | None) -> Work:
        return Work(self.past, tuple(enumerate(users)), self.vocab, begin, seconds)


@asynccontextmanager
async def running_service(
    size: ServiceSize, processes: Executor, clients: int, box_class: type[Box] = Box
) -> AsyncIterator[Service]:
    """Start it, upload the adapters and bring each onto the device."""
    with TemporaryDirectory(prefix="granatum-bench-") as directory:
        layout = Layout(
            model=size.model,
            state=Path(directory),
            runners=1,
            tenants=(_TENANT,),
            runner_arguments=("--random-weights", *size.runner_arguments),
        )
        started = time.monotonic()
        async with box_class(layout, lambda line: print(line, flush=True)) as box:
            start_s = time.monotonic() - started
            async with Client(box.address, key=box.keys[_TENANT]) as client:
                uploads = await _upload(client, size, Path(directory) / "uploads")
            async with Client(box.address, key=box.keys[ADMIN]) as client:
                (runner,) = await client.runners()
            through = ThroughRouter(box.address, box.keys[_TENANT])
            digests = tuple(digest for _, digest in uploads)
            past = PastRouter(runner.address, box.cluster_key, digests, runner.max_batch)
            upload_s = tuple(seconds for seconds, _ in uploads)
            service = Service(through, past, size.vocab, processes, clients, start_s, upload_s)
            await asyncio.to_thread(service.drive, _one_each(size.adapters))
            await _all_graphs(layout.log_directory / "runner-0.log")
            yield service


async def _all_graphs(log: Path) -> None:
    """Wait until the idle runner, if it has a GPU, has captured its graphs."""
    ends = ("all graphs captured", "no more graphs are captured")
    while "capturing graphs" in (said := await asyncio.to_thread(log.read_text)):
        if any(end in said for end in ends):
            return
        await asyncio.sleep(_POLL_S)


def _one_each(adapters: int) -> Users:
    return tuple((Request(8, 2, adapter),) for adapter in range(adapters))


async def _upload(
    client: Client, size: ServiceSize, directory: Path
) -> Sequence[tuple[float, str]]:
    """Seconds and digest of each upload."""
    base = BaseModel.from_config(size.model)
    turns = asyncio.Semaphore(_UPLOADS)

    async def upload(number: int) -> tuple[float, str]:
        async with turns:
            files = directory / str(number)
            await asyncio.to_thread(write_adapter, files, base, size.rank, number)
            began = time.monotonic()
            stored = await client.upload(f"adapter-{number}", files)
            return time.monotonic() - began, stored.adapter.digest

    return await asyncio.gather(*(upload(number) for number in range(size.adapters)))
