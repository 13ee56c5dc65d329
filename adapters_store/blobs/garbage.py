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
    """What the catalogs say: digests that are or were needed, and those published, by tenant."""

    needed: set[str] = field(default_factory=set)
    published: dict[str, frozenset[str]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    remembering: list[str] = field(default_factory=list)
    """Tenants with a memory of deletions that is no longer needed."""

    def add(self, tenant: str, catalog: Catalog, since: float) -> None:
        """Take in a tenant's catalog, and what it held since then."""
        self.needed.update(version.digest for _, version in catalog.versions())
        self.needed.update(d for d, gone in catalog.retired.items() if gone.at >= since)
        self.published[tenant] = catalog.published
        if catalog.forget_deleted(since) != catalog:
            self.remembering.append(tenant)

    def is_unneeded(self, hint: Hint) -> bool:
        """Whether its tenant does not publish the digest. A damaged catalog does not tell."""
        return hint.tenant not in self.damaged and hint.digest not in self.published.get(
            hint.tenant, ()
        )


async def collect(
    objects: Objects, blobs: Blobs, tenants: Tenants, now: float, grace_s: float
) -> Collected:
    """Delete blobs and hints that no catalog refers to, or did within `grace_s` before `now`.

    An upload refers only to bytes of its own epoch, and what is deleted here is of epochs in which
    every upload has long finished: none can begin to need it between the look and the deletion.

    A damaged catalog may refer to anything. While there is one, nothing but second copies goes.
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
    """Those of other digests, and all but the newest whole one of each needed digest."""
    kept: set[str] = set()
    unneeded = []
    for blob in blobs:  # newest first within a digest
        if blob.digest not in needed or blob.digest in kept:
            unneeded.append(blob)
        elif blob.is_complete:
            kept.add(blob.digest)
    return unneeded
