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

import structlog

from granatum.adapters_store.blobs.strays import Strays, epoch_in
from granatum.adapters_store.catalog.catalog import Catalog
from granatum.adapters_store.catalog.catalog_json import CatalogDamaged, decode, encode
from granatum.adapters_store.names import check_name, is_digest, is_name
from granatum.adapters_store.objects.objects import Objects, Stored
from granatum.v1.errors import RETRY_AFTER_S, Unavailable

PREFIX = "tenants"
PUBLISHED_PREFIX = "published"
_CACHED_TENANTS = 4096
_SWAP_ATTEMPTS = 64
_SMALL_BYTES = 1 << 16
"""A catalog up to this size is read and written within two milliseconds, without a thread."""
_SMALL_VERSIONS = 200

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hint:
    """A note in the store: this tenant may have published this digest."""

    key: str
    digest: str
    tenant: str
    epoch: int


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
        self._strays = Strays()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def read(self, tenant: str) -> Catalog:
        """The tenant's catalog as it is now; empty for a tenant that has none."""
        return (await self._read(tenant)).catalog

    async def change(self, tenant: str, change: Callable[[Catalog], tuple[Catalog, T]]) -> T:
        """Apply `change` to the newest catalog and return its result.

        If another router changed the catalog meanwhile, `change` is applied again.
        """
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
            retry_after_s=RETRY_AFTER_S,
        )

    async def publishers(self, digest: str) -> list[str]:
        """The tenants that may have published these bytes, sorted."""
        return sorted({hint.tenant for hint in await self.hints(digest)})

    async def hints(self, digest: str | None = None) -> list[Hint]:
        """The hints for these bytes, or for all bytes."""
        prefix = PUBLISHED_PREFIX if digest is None else f"{PUBLISHED_PREFIX}/{digest}"
        return [hint for key in await self._keys(prefix) if (hint := self._hint(key)) is not None]

    def _hint(self, key: str) -> Hint | None:
        parts = key.split("/")
        if len(parts) == 4 and is_digest(parts[1]) and is_name(parts[2]):
            epoch = epoch_in(parts[3])
            if epoch is not None:
                return Hint(key, parts[1], parts[2], epoch)
        self._strays.leave(key)
        return None

    async def names(self) -> list[str]:
        """The tenants that have a catalog, sorted."""
        names = []
        for key in await self._keys(PREFIX):
            name = key.removeprefix(f"{PREFIX}/").removesuffix(".json")
            if is_name(name) and key == _key(name):
                names.append(name)
            else:
                self._strays.leave(key)
        return names

    async def _keys(self, prefix: str) -> list[str]:
        return [listed.key for listed in await self._objects.listing(prefix)]

    async def _read(self, tenant: str) -> _Known:
        key, known = _key(tenant), self._known.get(tenant)
        stored = await self._objects.get(key, known.stored if known else None)
        if stored is None:
            # Tenants without a catalog are not remembered: their names would fill the memory.
            self._known.pop(tenant, None)
            return _Known(None, Catalog())
        if known is not None and stored is known.stored:
            catalog = known.catalog
        else:
            catalog, _ = await _decoded(stored.data, tenant)
        return self._remember(tenant, _Known(stored, catalog))

    async def _swap(self, tenant: str, known: _Known, changed: Catalog, revision: str) -> bool:
        # Hints are written first, so that no published digest is ever without one.
        for digest in changed.published - known.catalog.published:
            hint = f"{PUBLISHED_PREFIX}/{digest}/{tenant}/{self._epoch()}"
            await self._objects.put(hint, b"")
        data = await _encoded(changed, revision)
        stored = await self._objects.swap(_key(tenant), data, known.stored)
        if stored is None:
            # If an answer is lost, obstore writes again. The second write then finds the first.
            stored = await self._objects.get(_key(tenant))
            if stored is None or (await _decoded(stored.data, tenant))[1] != revision:
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


async def _decoded(data: bytes, tenant: str) -> tuple[Catalog, str]:
    try:
        if len(data) <= _SMALL_BYTES:
            return decode(data)
        return await asyncio.to_thread(decode, data)
    except CatalogDamaged as error:
        log.error("catalog is damaged", tenant=tenant, error=str(error.__cause__))
        raise


async def _encoded(catalog: Catalog, revision: str) -> bytes:
    if sum(len(adapter.versions) for adapter in catalog.adapters.values()) <= _SMALL_VERSIONS:
        return encode(catalog, revision)
    return await asyncio.to_thread(encode, catalog, revision)
