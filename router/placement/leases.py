"""What this router holds in the registry, kept alive until it lets go."""

import asyncio
from collections.abc import Callable, Collection

import structlog

from granatum.router.placement.placement import Lease, LeaseKind
from granatum.router.placement.registry import Registry
from granatum.v1.errors import Unavailable

_RENEWALS_PER_LEASE = 3
_RETRY_S = 0.25

log = structlog.get_logger(__name__)


class Leases:
    """Renews and releases leases in the background, many with one call.

    To release never waits and never fails. While the registry is away, the release is tried again
    until the lease lapses by itself.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._held: set[Lease] = set()
        self._released: dict[Lease, float] = {}  # by lease: when it lapses by itself
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Renew and release until cancelled."""
        terms = self._registry.terms
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew_forever(self._entries, terms.entry_lease_s))
            tasks.create_task(self._renew_forever(self._others, terms.lease_s))
            tasks.create_task(self._release_forever())

    async def close(self) -> None:
        """Release everything, after the end of `run`."""
        await self._release(self._held | self._released.keys())

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, lease: Lease) -> None:
        """Keep a lease alive that the registry just granted."""
        self._held.add(lease)
        self._released.pop(lease, None)

    def release(self, lease: Lease) -> None:
        """Release a lease. A second call does nothing."""
        if lease in self._held:
            self.abandon(lease)

    def abandon(self, lease: Lease) -> None:
        """Release what the registry may have granted in a call without an answer."""
        self._held.discard(lease)
        lapses = asyncio.get_running_loop().time() + self._registry.terms.lease_s
        self._released[lease] = lapses
        self._wake.set()

    def _entries(self) -> set[Lease]:
        return {lease for lease in self._held if lease.kind is LeaseKind.ENTRY}

    def _others(self) -> set[Lease]:
        return {lease for lease in self._held if lease.kind is not LeaseKind.ENTRY}

    async def _renew_forever(self, held: Callable[[], set[Lease]], lease_s: float) -> None:
        while True:
            renewed = await self._renew(held())
            await asyncio.sleep(lease_s / _RENEWALS_PER_LEASE if renewed else _RETRY_S)

    async def _renew(self, held: set[Lease]) -> bool:
        try:
            await self._registry.renew(held)
        except Unavailable as error:
            log.warning("leases not renewed", leases=len(held), error=error.message)
            return False
        # The call may have renewed leases that were released meanwhile. Release those again.
        for lease in held - self._held:
            self.abandon(lease)
        return True

    async def _release_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            released = dict(self._released)
            if await self._release(released):
                self._forget(released)
            else:
                await asyncio.sleep(_RETRY_S)
                self._forget_lapsed()
                self._wake.set()

    def _forget(self, told: dict[Lease, float]) -> None:
        for lease, lapses in told.items():
            if self._released.get(lease) == lapses:  # unless it was released once more meanwhile
                del self._released[lease]

    def _forget_lapsed(self) -> None:
        now = asyncio.get_running_loop().time()
        self._released = {lease: end for lease, end in self._released.items() if end > now}

    async def _release(self, leases: Collection[Lease]) -> bool:
        if not leases:
            return True
        try:
            await self._registry.release(leases)
        except Unavailable as error:
            log.warning("leases not released yet", leases=len(leases), error=error.message)
            return False
        return True
