"""Deletes blobs that no adapter refers to, on one router at a time."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from granatum.router.placement.placement import Lease, LeaseKind
from granatum.router.placement.registry import Registry
from granatum.v1.errors import GranatumError

log = structlog.get_logger(__name__)


class Collection:
    """Calls `collect_garbage` every `interval_s`, unless another router collects just then."""

    def __init__(
        self,
        collect_garbage: Callable[[], Awaitable[object]],
        registry: Registry,
        router_id: str,
        interval_s: float,
    ) -> None:
        self._collect_garbage = collect_garbage
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
            except Exception:
                # A surprise in the store or the registry must not end the router's streams.
                log.exception("collection of blobs failed")

    async def collect(self) -> None:
        """Collect once, unless another router does."""
        if not await self._registry.claim(self._turn):
            return
        collecting = asyncio.ensure_future(self._collect_garbage())
        try:
            while not collecting.done():
                await asyncio.wait({collecting}, timeout=self._registry.terms.lease_s / 3)
                await self._registry.renew([self._turn])
            await collecting
        finally:
            collecting.cancel()
            await asyncio.wait({collecting})
            # Even while this router stops: other routers would wait for the lease to end.
            await asyncio.shield(self._registry.release([self._turn]))
