"""Tenants' catalogs in the store: read, cached, and changed by compare-and-swap.

tenants/<tenant>.json                   the catalog
published/<digest>/<tenant>/<epoch>     who published these bytes: a hint, the catalog decides
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

from granatum.adapters_store.catalog import Catalog
from granatum.adapters_store.catalog_json import decode, encode
from granatum.adapters_store.names import check_name
from granatum.adapters_store.objects import Objects, Stored
from granatum.v1.errors import Unavailable

PREFIX = "tenants"
PUBLISHED_PREFIX = "published"
_CACHED_TENANTS = 4096
_SWAP_ATTEMPTS = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Known:
    """What was last read of a tenant."""

    stored: Stored | None
    catalog: Catalog


class Tenants:
    """The catalogs. `epoch` tells the current one, for the hints."""

    def __init__(self, objects: Objects, epoch: Callable[[], int]) -> None:
        self._objects = objects
        self._epoch = epoch
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def read(self, tenant: str) -> Catalog:
        """The tenant's catalog as it is now; empty for a tenant that has none."""
        return (await self._read(tenant)).catalog

    async def change(self, tenant: str, change: Callable[[Catalog], tuple[Catalog, T]]) -> T:
        """Apply `change` to the newest catalog, again if another router was faster; its result."""
        lock = self._locks.setdefault(tenant, asyncio.Lock())
        async with lock:
            revision = uuid4().hex
            for attempt in range(_SWAP_ATTEMPTS):
                known = await self._read(tenant)
                changed, result = change(known.catalog)
                if changed == known.catalog or await self._swap(tenant, known, changed, revision):
                    return result
                await asyncio.sleep(random.uniform(0, min(0.5, 0.01 * 2**attempt)))
        raise Unavailable(
            "too many changes to this tenant's adapters at once: try again",
            reason="STORE_CONTENTION",
            retry_after_s=1.0,
        )

    async def publishers(self, digest: str) -> list[str]:
        """The tenants that may have published these bytes, sorted."""
        keys = await self._objects.listing(f"{PUBLISHED_PREFIX}/{digest}")
        return sorted({listed.key.split("/")[2] for listed in keys})

    async def _read(self, tenant: str) -> _Known:
        key, known = _key(tenant), self._known.get(tenant)
        stored = await self._objects.get(key, known.stored if known else None)
        if stored is None:
            # Not remembered, so that names of tenants that never were fill no memory.
            self._known.pop(tenant, None)
            return _Known(None, Catalog())
        if known is not None and stored is known.stored:
            catalog = known.catalog
        else:
            catalog, _ = decode(stored.data, key)
        return self._remember(tenant, _Known(stored, catalog))

    async def _swap(self, tenant: str, known: _Known, changed: Catalog, revision: str) -> bool:
        # Hints first: a published digest must never be without one.
        for digest in changed.published() - known.catalog.published():
            hint = f"{PUBLISHED_PREFIX}/{digest}/{tenant}/{self._epoch()}"
            await self._objects.put(hint, b"")
        data = encode(changed, revision)
        stored = await self._objects.swap(_key(tenant), data, known.stored)
        if stored is None:
            # A write whose answer got lost is tried again by obstore and meets itself.
            stored = await self._objects.get(_key(tenant))
            if stored is None or decode(stored.data, _key(tenant))[1] != revision:
                return False
        self._remember(tenant, _Known(stored, changed))
        return True

    def _remember(self, tenant: str, known: _Known) -> _Known:
        self._known[tenant] = known
        self._known.move_to_end(tenant)
        while len(self._known) > _CACHED_TENANTS:
            self._known.popitem(last=False)
        return known


def _key(tenant: str) -> str:
    check_name(tenant, "tenant name")
    return f"{PREFIX}/{tenant}.json"
