"""Which stored bytes nobody needs any more."""

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from granatum.adapters_store.blobs import Blob, Blobs, epoch_end
from granatum.adapters_store.catalog import Catalog
from granatum.adapters_store.objects import Objects
from granatum.adapters_store.tenants import Tenants

COMMIT_WITHIN_S = 600.0
"""The longest that an upload may take from storing its bytes to referring to them."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: blobs, and their bytes."""

    blobs: int
    bytes: int


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
    catalogs = await tenants.all()
    readable = {tenant: catalog for tenant, catalog in catalogs.items() if catalog is not None}
    damaged = sorted(catalogs.keys() - readable.keys())
    needed = _needed(readable.values(), now - grace_s)
    if damaged:
        log.error("a damaged catalog keeps unneeded blobs from collection", tenants=damaged)
        needed |= {blob.digest for blob in old_blobs}
    unneeded = _unneeded(old_blobs, needed)
    files = [file for blob in unneeded for file in blob.files.values()]
    await objects.delete([file.key for file in files])
    await objects.delete(
        [
            hint.key
            for hint in hints
            if hint.tenant not in damaged
            and hint.digest not in readable.get(hint.tenant, Catalog()).published()
        ]
    )
    for tenant, catalog in readable.items():
        if catalog.forget_deleted(now - grace_s) != catalog:
            await tenants.change(tenant, lambda c: (c.forget_deleted(now - grace_s), None))
    return Collected(blobs=len(unneeded), bytes=sum(file.size for file in files))


def _needed(catalogs: Iterable[Catalog], since: float) -> frozenset[str]:
    """The digests of versions that exist, or did since then."""
    return frozenset(
        digest
        for catalog in catalogs
        for digest in (
            *(version.digest for _, version in catalog.versions()),
            *(digest for digest, gone in catalog.retired.items() if gone.at >= since),
        )
    )


def _unneeded(blobs: list[Blob], needed: frozenset[str]) -> list[Blob]:
    """Those of other digests, and all but the newest whole one of each needed digest."""
    kept: set[str] = set()
    unneeded = []
    for blob in blobs:  # newest first within a digest
        if blob.digest not in needed or blob.digest in kept:
            unneeded.append(blob)
        elif blob.is_complete:
            kept.add(blob.digest)
    return unneeded
