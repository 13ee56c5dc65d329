"""One router's admission, and what of it the server keeps."""

import asyncio
import glob
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from placements import terms
from redis.asyncio import Redis

from granatum.router.placement.admission import Admission
from granatum.router.placement.leases import Leases
from granatum.router.placement.placement import Placed, PlacementRequest
from granatum.router.placement.registry import Registry
from granatum.v1.cluster_pb2 import Runner


@dataclass
class Desk:
    """One router's admission."""

    registry: Registry
    leases: Leases
    admission: Admission
    unreachable: set[str]

    async def admit(self, id_: str, within_s: float = 10, **fields: object) -> Placed:
        give_up = asyncio.get_running_loop().time() + within_s
        request = PlacementRequest(id_, tokens=1, **fields)  # type: ignore[arg-type]
        return await self.admission.admit(request, give_up)


@asynccontextmanager
async def opened(
    redis_url: str, fleet: str, lease_s: float = 1.0, **bounds: int
) -> AsyncIterator[Desk]:
    unreachable: set[str] = set()
    async with Registry(redis_url, fleet, terms(lease_s=lease_s, **bounds)) as registry:
        leases = Leases(registry)
        admission = Admission(registry, leases, lambda: unreachable)
        tasks = [asyncio.create_task(part.run()) for part in (leases, admission)]
        yield Desk(registry, leases, admission, unreachable)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await leases.close()


async def beat(registry: Registry, id_: str, max_batch: int, max_rank: int = 0) -> None:
    """A runner's heartbeat."""
    runner = Runner(
        id=id_,
        address="x:1",
        max_batch=max_batch,
        free_pages=100,
        page_tokens=16,
        max_context=99,
        max_rank=max_rank,
    )
    await registry.heartbeat(runner)


async def waiting(desk: Desk, number: int) -> None:
    """Return as soon as `number` sequences wait at this router."""
    async with asyncio.timeout(5):
        while len(desk.admission._line) != number:
            await asyncio.sleep(0.005)


async def kept(redis_url: str, fleet: str) -> dict[str, int]:
    """What of reservations, entries and claims the server keeps, by key."""
    prefix = f"{{granatum:{fleet}}}:"
    sizes = {}
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        async for key in redis.scan_iter(f"{glob.escape(prefix)}*"):
            name = key.removeprefix(prefix)
            if name.startswith(("reserved:", "running:", "queued:", "queue", "waiting")):
                sizes[name] = await redis.zcard(key)
            elif name.startswith("claim:"):
                sizes[name] = 1
    return sizes


async def nothing_kept(redis_url: str, fleet: str, within_s: float) -> None:
    """Return as soon as the server keeps nothing; TimeoutError after `within_s` seconds."""
    async with asyncio.timeout(within_s):
        while await kept(redis_url, fleet):
            await asyncio.sleep(0.01)
