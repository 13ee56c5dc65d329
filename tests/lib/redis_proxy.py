"""A wire between a registry and its server that can damage, cut and delay what comes back."""

import asyncio
from collections.abc import AsyncIterator, Callable
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
    connections: int = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def answer(self, piece: bytes) -> bytes | None:
        await self.flowing.wait()
        return piece if self.damage is None else self.damage(piece)


@asynccontextmanager
async def wire_to(redis_url: str) -> AsyncIterator[Wire]:
    """A wire to the server at `redis_url`."""
    wire = Wire()
    wire.flowing.set()
    tasks: set[asyncio.Task[None]] = set()
    address = urlsplit(redis_url)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.connections += 1
        if address.scheme == "unix":
            up_reader, up_writer = await asyncio.open_unix_connection(address.path)
        else:
            up_reader, up_writer = await asyncio.open_connection(address.hostname, address.port)
        up = asyncio.create_task(_pump(reader, up_writer))
        tasks.add(up)
        try:
            while piece := await up_reader.read(65536):
                answer = await wire.answer(piece)
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()
        except OSError:
            pass
        finally:
            up.cancel()
            writer.close()
            up_writer.close()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    wire.port = server.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
