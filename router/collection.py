"""Removing blobs that no adapter refers to, by one router at a time."""

import asyncio

import structlog

from granatum.adapters_store.store import AdapterStore
from granatum.router.placement import Lease, LeaseKind
from granatum.router.registry import Registry
from granatum.v1.errors import GranatumError

log = structlog.get_logger(__name__)


class Collection:
    """Collects every `interval_s`, if no other router is at it."""

    def __init__(
        self, store: AdapterStore, registry: Registry, router_id: str, interval_s: float
    ) -> None:
        self._store = store
        self._registry = registry
        self._turn = Lease(LeaseKind.CLAIM, "task:collection", router_id)
        self._interval_s = interval_s

    async def run(self) -> None:
        """Collect until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.collect()
            except GranatumError as error:
                log.warning("collection of blobs failed", error=error.message)

    async def collect(self) -> None:
        """Collect once, unless another router does."""
        if not await self._registry.claim(self._turn):
            return
        collecting = asyncio.create_task(self._store.collect_garbage())
        try:
            while not collecting.done():
                await asyncio.wait({collecting}, timeout=self._registry.lease_s / 3)
                await self._registry.renew([self._turn])
            log.info("blobs collected", removed=await collecting)
        finally:
            collecting.cancel()
            await self._registry.release([self._turn])
