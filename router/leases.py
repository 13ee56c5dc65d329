"""What this router holds in the registry, kept alive until it lets go."""

import asyncio
from collections.abc import Iterable

import structlog

from granatum.router.placement import Lease
from granatum.router.registry import Registry
from granatum.v1.errors import Unavailable

_RENEWALS_PER_LEASE = 3
_RETRY_S = 0.25

log = structlog.get_logger(__name__)


class Leases:
    """Renews what is held and lets go in the background, many leases to a call.

    Letting go never waits and never fails: what the registry does not hear of lapses.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._held: set[Lease] = set()
        self._released: set[Lease] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Renew and release until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew_forever())
            tasks.create_task(self._release_forever())

    async def close(self) -> None:
        """Let go of everything, after the end of `run`."""
        await self._release(self._held | self._released)

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, lease: Lease) -> None:
        """Keep a lease that the registry just granted."""
        self._held.add(lease)
        self._released.discard(lease)

    def release(self, lease: Lease) -> None:
        """Let go of a lease; again is no harm."""
        if lease in self._held:
            self._held.discard(lease)
            self._released.add(lease)
            self._wake.set()

    async def _renew_forever(self) -> None:
        while True:
            interval = self._registry.lease_s / _RENEWALS_PER_LEASE
            await asyncio.sleep(interval if await self._renew() else _RETRY_S)

    async def _renew(self) -> bool:
        held = frozenset(self._held)
        try:
            await self._registry.renew(held)
        except Unavailable as error:
            log.warning("leases not renewed", leases=len(held), error=error.message)
            return False
        # What was let go while the call was under way may have been renewed after all.
        self._released |= held - self._held
        self._wake.set()
        return True

    async def _release_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            released, self._released = self._released, set()
            if released:
                await self._release(released)

    async def _release(self, leases: Iterable[Lease]) -> None:
        try:
            await self._registry.release(leases)
        except Unavailable as error:
            log.warning("leases left to lapse", error=error.message)
