"""Which stored bytes nobody needs any more."""

from collections.abc import Set
from dataclasses import dataclass, field

import structlog

from granatum.adapters_store.blobs.blobs import Blob, Blobs, epoch_end
from granatum.adapters_store.catalog.catalog import Catalog
from granatum.adapters_store.catalog.catalog_json import CatalogDamaged
from granatum.adapters_store.catalog.tenants import Hint, Tenants
from granatum.adapters_store.objects.objects import Objects

COMMIT_WITHIN_S = 600.0
"""The longest that an upload may take from storing its bytes to referring to them."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: blobs, and their bytes."""

    blobs: int
    bytes: int


@dataclass(slots=True)
class _Survey:
    """What the catalogs say: the digests that are or were needed, and each tenant's published."""

    needed: set[str] = field(default_factory=set)
    published: dict[str, frozenset[str]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    remembering: list[str] = field(default_factory=list)
    """Tenants with a memory of deletions that is no longer needed."""

    def add(self, tenant: str, catalog: Catalog, since: float) -> None:
        """Note what a tenant's catalog holds, and what it held after `since` (Unix seconds)."""
        self.needed.update(version.digest for _, version in catalog.versions())
        self.needed.update(d for d, gone in catalog.retired.items() if gone.at >= since)
        self.published[tenant] = catalog.published
        if catalog.forget_deleted(since) != catalog:
            self.remembering.append(tenant)

    def is_unneeded(self, hint: Hint) -> bool:
        """Whether the hint's tenant does not publish the digest.

        The hint of a tenant with a damaged catalog is kept: nobody knows what the tenant publishes.
        """
        return hint.tenant not in self.damaged and hint.digest not in self.published.get(
            hint.tenant, ()
        )


async def collect(
    objects: Objects, blobs: Blobs, tenants: Tenants, now: float, grace_s: float
) -> Collected:
    """Delete blobs and hints that no catalog refers to, or did refer to since `now - grace_s`.

    Only bytes of old epochs are deleted, in which every upload has long finished. An upload refers
    only to bytes of its own epoch. So no upload can begin to need bytes between the look at the
    catalogs and the deletion.

    A damaged catalog may refer to any bytes. While there is one, only second copies are deleted.
    """
    settled = now - max(grace_s, 2 * COMMIT_WITHIN_S)
    old_blobs = [b for b in await blobs.listing() if epoch_end(b.epoch) <= settled]
    hints = [h for h in await tenants.hints() if epoch_end(h.epoch) <= settled]
    survey = await _surveyed(tenants, now - grace_s)
    if survey.damaged:
        log.error("a damaged catalog keeps unneeded blobs", tenants=survey.damaged)
        survey.needed.update(blob.digest for blob in old_blobs)
    unneeded = _unneeded(old_blobs, survey.needed)
    files = [file for blob in unneeded for file in blob.files.values()]
    await objects.delete([file.key for file in files])
    await objects.delete([hint.key for hint in hints if survey.is_unneeded(hint)])
    for tenant in survey.remembering:
        await tenants.change(tenant, lambda c: (c.forget_deleted(now - grace_s), None))
    return Collected(blobs=len(unneeded), bytes=sum(file.size for file in files))


async def _surveyed(tenants: Tenants, since: float) -> _Survey:
    survey = _Survey()
    for tenant in await tenants.names():
        try:
            survey.add(tenant, await tenants.read(tenant), since)
        except CatalogDamaged:
            survey.damaged.append(tenant)
    return survey


def _unneeded(blobs: list[Blob], needed: Set[str]) -> list[Blob]:
    """The blobs to delete: all of digests that nobody needs, and second copies of the others."""
    kept: set[str] = set()
    unneeded = []
    for blob in blobs:  # newest first within a digest
        if blob.digest not in needed or blob.digest in kept:
            unneeded.append(blob)
        elif blob.is_complete:
            kept.add(blob.digest)
    return unneeded
