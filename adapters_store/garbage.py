"""Which stored bytes nobody needs any more."""

from collections.abc import Iterable
from dataclasses import dataclass

from granatum.adapters_store.blobs import Blob, Blobs, epoch_end
from granatum.adapters_store.catalog import Catalog
from granatum.adapters_store.objects import Objects
from granatum.adapters_store.tenants import PREFIX, PUBLISHED_PREFIX, Tenants

COMMIT_WITHIN_S = 600.0
"""The longest that an upload may take from storing its bytes to referring to them."""


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
    """
    settled = now - max(grace_s, 2 * COMMIT_WITHIN_S)
    old_blobs = [b for b in await blobs.listing() if epoch_end(b.epoch) <= settled]
    hints = [h for h in await _hints(objects) if epoch_end(h.epoch) <= settled]
    catalogs = await _catalogs(objects, tenants)
    unneeded = _unneeded(old_blobs, _needed(catalogs.values(), now - grace_s))
    files = [file for blob in unneeded for file in blob.files.values()]
    await objects.delete([file.key for file in files])
    await objects.delete(
        [h.key for h in hints if h.digest not in catalogs.get(h.tenant, Catalog()).published()]
    )
    for tenant, catalog in catalogs.items():
        if any(at < now - grace_s for at in catalog.retired.values()):
            await tenants.change(tenant, lambda c: (c.forget_retired(now - grace_s), None))
    return Collected(blobs=len(unneeded), bytes=sum(file.size for file in files))


async def _catalogs(objects: Objects, tenants: Tenants) -> dict[str, Catalog]:
    keys = [listed.key for listed in await objects.listing(PREFIX)]
    names = [key.removeprefix(f"{PREFIX}/").removesuffix(".json") for key in keys]
    return {name: await tenants.read(name) for name in names}


def _needed(catalogs: Iterable[Catalog], since: float) -> frozenset[str]:
    """The digests of versions that exist, or did since then."""
    return frozenset(
        digest
        for catalog in catalogs
        for digest in (
            *(version.digest for _, version in catalog.versions()),
            *(digest for digest, at in catalog.retired.items() if at >= since),
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


@dataclass(frozen=True, slots=True)
class _Hint:
    """That a tenant may have published a digest."""

    key: str
    digest: str
    tenant: str
    epoch: int


async def _hints(objects: Objects) -> list[_Hint]:
    hints = []
    for listed in await objects.listing(PUBLISHED_PREFIX):
        _, digest, tenant, epoch = listed.key.split("/")
        hints.append(_Hint(listed.key, digest, tenant, int(epoch)))
    return hints
