"""A wire between a registry and its server that can damage, cut and delay what comes back."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Wire:
    """What happens to answers: as they are, until a test says otherwise."""

    port: int = 0
    damage: Callable[[bytes], bytes | None] | None = None
    """Each piece of an answer becomes this; None: the connection breaks instead."""
    flowing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"


@asynccontextmanager
async def wire_to(redis_url: str) -> AsyncIterator[Wire]:
    """A wire to the server at `redis_url`."""
    wire = Wire()
    wire.flowing.set()
    tasks: set[asyncio.Task[None]] = set()
    address = urlsplit(redis_url)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            with suppress(OSError):
                await _both(_pump(reader, up_writer), _answer(wire, up_reader, writer))
        finally:
            writer.close()
            up_writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(carry(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    wire.port = server.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        server.close()
        ending = tuple(tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


async def _both(*ways: Coroutine[object, object, None]) -> None:
    """Until one way ends."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        await wire.flowing.wait()
        answer = piece if wire.damage is None else wire.damage(piece)
        if answer is None:
            return
        writer.write(answer)
        await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
