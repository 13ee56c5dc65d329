"""The adapter store: what tenants upload, what their requests resolve to, what runners fetch."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from granatum.adapters_store.batches import Batches
from granatum.adapters_store.blobs.blobs import AdapterFiles, Blobs, epoch_of
from granatum.adapters_store.blobs.garbage import COMMIT_WITHIN_S, Collected, collect
from granatum.adapters_store.blobs.incoming import UploadHeader, receive
from granatum.adapters_store.blobs.scratch import Scratch
from granatum.adapters_store.catalog.catalog import Catalog, Version, Visibility
from granatum.adapters_store.catalog.catalog_json import CatalogDamaged
from granatum.adapters_store.catalog.manifest import Manifest, Page
from granatum.adapters_store.catalog.tenants import Tenants
from granatum.adapters_store.chat import check_chat
from granatum.adapters_store.format.validate import Summary, validate
from granatum.adapters_store.limits import DEFAULT_LIMITS, FleetLimits, UploadLimits
from granatum.adapters_store.names import AdapterRef, check_name, shown
from granatum.adapters_store.objects.location import open_objects
from granatum.adapters_store.objects.objects import Objects
from granatum.adapters_store.proof import ProofResult
from granatum.adapters_store.threads import until_done
from granatum.models.base_model import BaseModel
from granatum.models.identity import differences
from granatum.v1.errors import InvalidRequest, NotFound, PreconditionFailed, Unavailable

MAX_PAGE = 1000
"""The most adapters of a page."""
_UPLOAD_WITHIN_S = 86_400.0
_VALIDATIONS = 2

Prove = Callable[[Version], Awaitable[ProofResult]]
"""Computes a stored version on the fleet. Raises if the version must not become visible."""

log = structlog.get_logger(__name__)


class AdapterStore:
    """Adapters of all tenants. Methods raise Unavailable when the object store is away.

    A tenant never learns of another tenant's unpublished adapter: the answer is NotFound, in the
    same words as for an adapter that never existed.
    """

    def __init__(
        self,
        objects: Objects,
        base: BaseModel,
        limits: UploadLimits = DEFAULT_LIMITS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._base = base
        self._limits = limits
        self._now = now
        self._blobs = Blobs(objects)
        self._scratch = Scratch(objects.scratch)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._validations = asyncio.Semaphore(_VALIDATIONS)
        self._batches = Batches()
        self._tenants = Tenants(objects, lambda: epoch_of(now()))

    @classmethod
    def open(
        cls, url: str, base: BaseModel, limits: UploadLimits = DEFAULT_LIMITS
    ) -> "AdapterStore":
        """Open the store at `url` (see `open_objects`) for adapters of `base`."""
        return cls(open_objects(url), base, limits)

    async def upload(
        self,
        tenant: str,
        header: UploadHeader,
        chunks: AsyncIterator[bytes],
        fleet: FleetLimits = (),
        prove: Prove | None = None,
    ) -> tuple[Manifest, bool]:
        """Store the files as the next version of `header.name`; return it, and whether it is new.

        An upload that equals the newest version, for the same base model, returns that version.
        Nothing is visible before everything is checked, including whether a runner of `fleet` can
        serve the adapter. A failed upload leaves nothing behind.

        `prove` is asked once the bytes are stored, before anything is visible. It raises if the
        adapter must not become visible. The bytes of a refused adapter count against the tenant
        until garbage is collected.
        """
        header.check(self._limits)
        catalog = await self._tenants.read(tenant)
        newest = catalog.newest(header.name)
        if newest is None or newest.digest != header.digest:  # equal bytes take no room
            catalog.check_room(header.name, header.digest, header.size_bytes, self._limits)
        with self._scratch.room(header.size_bytes) as directory:
            files = await receive(header, chunks, directory)
            summary = await self._validate(tenant, files, fleet, header.base_model)
            manifest, created = await self._commit(tenant, header, summary, files, prove)
        log.info("adapter uploaded", adapter=manifest.full_name, created=created)
        return manifest, created

    async def _validate(
        self, tenant: str, files: Sequence[Path], fleet: FleetLimits, asked_for: str
    ) -> Summary:
        """Validate one upload of a tenant at a time, and few in all: validation takes a core."""
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        async with turn, self._validations:
            config, weights, *chat = files
            for file in chat:
                await until_done(check_chat, file, self._base.folder)
            return await until_done(
                validate, config, weights, self._base, self._limits, fleet, asked_for
            )

    async def _commit(
        self,
        tenant: str,
        header: UploadHeader,
        summary: Summary,
        files: Sequence[Path],
        prove: Prove | None,
    ) -> tuple[Manifest, bool]:
        begun = self._now()
        version = Version(
            version=0,
            digest=header.digest,
            size_bytes=header.size_bytes,
            max_rank=summary.max_rank,
            target_modules=summary.target_modules,
            create_time=begun,
            base_fingerprint=self._base.fingerprint,
            elements=summary.elements,
            base_model=summary.base_model,
            chat_sha256=header.chat_sha256,
        )
        await self._blobs.put(header.digest, files, epoch_of(begun))
        if prove is not None:
            await self._hold(tenant, header.name, version)
            version = replace(version, proof=await prove(version))

        def add(catalog: Catalog) -> tuple[Catalog, tuple[Manifest, bool]]:
            if self._now() - begun > COMMIT_WITHIN_S:
                raise Unavailable(
                    "storing the adapter took too long: try again", reason="STORE_SLOW"
                )
            newest = catalog.newest(header.name)
            created = newest is None or not newest.is_the_same_as(version)
            if created:
                catalog = catalog.add_version(header.name, version, self._limits)
                newest = catalog.newest(header.name)
            assert newest is not None
            if not created and version.proof is not None:
                catalog = catalog.set_proof(header.name, newest.version, version.proof)
                newest = replace(newest, proof=version.proof)
            return catalog, (Manifest.of(catalog, tenant, header.name, newest), created)

        return await self._tenants.change(tenant, add)

    async def _hold(self, tenant: str, name: str, version: Version) -> None:
        await self._tenants.change(
            tenant, lambda catalog: (catalog.hold(name, version, self._limits), None)
        )

    async def get(self, tenant: str, ref: str) -> Manifest:
        """The version that `ref` stands for; see `AdapterRef.parse`."""
        found = await self._find(tenant, AdapterRef.parse(ref))
        if found is None:
            raise NotFound(
                f"there is no adapter {shown(ref)} that you may use: list your adapters, or give "
                "tenant/name for one that another tenant published"
            )
        return found

    async def resolve(self, tenant: str, ref: str) -> Manifest:
        """As `get`, for serving. Raises PreconditionFailed for an adapter of another base model."""
        manifest = await self.get(tenant, ref)
        if manifest.base_fingerprint != self._base.fingerprint:
            other = " and ".join(differences(manifest.base_fingerprint, self._base.fingerprint))
            raise PreconditionFailed(
                f"adapter {manifest.name}@{manifest.version} was uploaded for another base model "
                f"than {self._base.name}, which is served here (other {other}): upload it again "
                f"if it was made for {self._base.name}",
                reason="OTHER_BASE_MODEL",
            )
        return manifest

    async def _find(self, tenant: str, ref: AdapterRef) -> Manifest | None:
        if ref.digest is not None:
            return await self._find_digest(tenant, ref.digest)
        assert ref.name is not None
        owner = ref.tenant or tenant
        catalog = await self._tenants.read(owner)
        found = catalog.find(ref.name, ref.version)
        if found is None:
            return None
        manifest = Manifest.of(catalog, owner, *found)
        if owner == tenant:
            return manifest
        # Only a published name is for others. An alias is its tenant's own.
        shared = manifest.visibility is Visibility.PUBLISHED and manifest.name == ref.name
        return manifest.for_strangers() if shared else None

    async def _find_digest(self, tenant: str, digest: str) -> Manifest | None:
        catalog = await self._tenants.read(tenant)
        found = catalog.find_digest(digest)
        if found is not None:
            return Manifest.of(catalog, tenant, *found)
        for owner in await self._tenants.publishers(digest):
            with suppress(CatalogDamaged):  # one damaged catalog stops its own tenant alone
                catalog = await self._tenants.read(owner)
                found = catalog.find_digest(digest, published=True)
                if found is not None:
                    return Manifest.of(catalog, owner, *found).for_strangers()
        return None

    async def list(self, tenant: str, page_size: int = 0, page_token: str = "") -> Page:
        """The tenant's own adapters, every version, by name and version."""
        size = min(page_size or MAX_PAGE, MAX_PAGE)
        catalog = await self._tenants.read(tenant)
        rest = list(islice(catalog.versions_after(*_position(page_token)), size + 1))
        page = await self._batches.made(lambda v: Manifest.of(catalog, tenant, *v), rest[:size])
        more = len(rest) > size
        return Page(tuple(page), f"{page[-1].name}@{page[-1].version}" if more else "")

    async def set_alias(self, tenant: str, alias: str, ref: str) -> Manifest:
        """Point `alias` at the tenant's `name@version`, or at the newest version of `name` now."""
        check_name(alias, "alias", "alias")
        name, version = _own(tenant, ref)

        def point(catalog: Catalog) -> tuple[Catalog, Manifest]:
            changed = catalog.set_alias(alias, name, version, self._limits)
            found = changed.find(alias, None)
            assert found is not None
            return changed, Manifest.of(changed, tenant, *found)

        return await self._tenants.change(tenant, point)

    async def delete_alias(self, tenant: str, alias: str) -> None:
        """Remove an alias."""
        check_name(alias, "alias", "alias")
        await self._tenants.change(tenant, lambda catalog: (catalog.delete_alias(alias), None))

    async def delete(self, tenant: str, ref: str) -> int:
        """Delete `name` or `name@version` with its aliases; return the number of versions.

        Streams in flight keep the bytes until garbage is collected. The numbers of deleted versions
        are never given again.
        """
        name, version = _own(tenant, ref)
        now = self._now()
        deleted = await self._tenants.change(
            tenant, lambda catalog: catalog.delete(name, version, now)
        )
        log.info("adapter deleted", tenant=tenant, adapter=ref, versions=deleted)
        return deleted

    async def set_visibility(self, tenant: str, name: str, visibility: Visibility) -> None:
        """Publish all versions of `name` to every tenant, or make them private."""
        check_name(name, field="name")
        await self._tenants.change(
            tenant, lambda catalog: (catalog.set_visibility(name, visibility), None)
        )

    async def fetch(self, digest: str, directory: Path) -> AdapterFiles:
        """Bring an adapter's files to `directory/<digest>/`, verified; see `Blobs.fetch`."""
        return await self._blobs.fetch(digest, directory)

    async def collect_garbage(self, grace_s: float = 3600.0) -> Collected:
        """Delete bytes that nothing refers to, or referred to in the last `grace_s` seconds."""
        await self._objects.clear_scratch(self._now() - _UPLOAD_WITHIN_S)
        collected = await collect(self._objects, self._blobs, self._tenants, self._now(), grace_s)
        log.info("garbage collected", blobs=collected.blobs, bytes=collected.bytes)
        return collected


def _own(tenant: str, ref: str) -> tuple[str, int | None]:
    """The name and version of a reference to one of the tenant's own adapters."""
    parsed = AdapterRef.parse(ref)
    if parsed.name is None or parsed.tenant not in (None, tenant):
        raise InvalidRequest(
            f"{shown(ref)}: name one of your own adapters as name or name@version",
            field="adapter",
        )
    return parsed.name, parsed.version


def _position(page_token: str) -> tuple[str, int]:
    """The name and version after which a page begins."""
    if not page_token:
        return "", 0
    ref = AdapterRef.parse(page_token, "page_token")
    if ref.name is None or ref.version is None or ref.tenant is not None:
        raise InvalidRequest(
            "page_token: give the next_page_token of the previous response", field="page_token"
        )
    return ref.name, ref.version
