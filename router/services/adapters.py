"""AdapterService: the tenants' adapters over the wire, from and to the store."""

# ruff: noqa: N802 - methods are named by the service

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import structlog

from granatum.adapters_store.batches import Batches
from granatum.adapters_store.blobs.incoming import FileDeclaration, UploadHeader
from granatum.adapters_store.catalog.catalog import Version, Visibility
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.limits import FleetLimits
from granatum.adapters_store.proof import ProofResult
from granatum.adapters_store.store import MAX_PAGE, AdapterStore, Prove
from granatum.router.services.access import current_max_priority, current_tenant
from granatum.router.services.proofs import Proofs, check_proof, result_message
from granatum.router.services.uploads import Fleet, Pace, Seats, discard, paced
from granatum.v1 import adapters_pb2 as pb
from granatum.v1.adapters_pb2_grpc import AdapterServiceServicer
from granatum.v1.cluster_pb2 import RunnerStatus
from granatum.v1.errors import (
    RETRY_AFTER_S,
    GranatumError,
    InvalidAdapter,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

MAX_CHUNK_BYTES = 1 << 20
USUAL_PACE = Pace()
_MAX_FILES = 16
_VISIBILITY = {
    Visibility.PRIVATE: pb.VISIBILITY_PRIVATE,
    Visibility.PUBLISHED: pb.VISIBILITY_PUBLISHED,
}
_FROM_WIRE = {wire: visibility for visibility, wire in _VISIBILITY.items()}

Context = grpc.aio.ServicerContext[Any, Any]


log = structlog.get_logger(__name__)


class AdapterServicer(AdapterServiceServicer):
    """Upload, show and change the calling tenant's adapters."""

    def __init__(
        self,
        store: AdapterStore,
        runners: Callable[[], Awaitable[list[RunnerStatus]]],
        proofs: Proofs,
        pace: Pace = USUAL_PACE,
    ) -> None:
        self._store = store
        self._proofs = proofs
        self._fleet = Fleet(runners)
        self._seats = Seats()
        self._hearings = Seats()
        self._batches = Batches()
        self._pace = pace

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> pb.UploadAdapterResponse:
        """Store an adapter as the next version of its name."""
        arriving, tenant = aiter(request_iterator), current_tenant()
        try:
            manifest, created = await self._upload(tenant, arriving, context)
        except GranatumError:
            with suppress(Overloaded), self._hearings.taken(tenant):
                await discard(arriving)
            raise
        return pb.UploadAdapterResponse(adapter=_adapter(manifest), created=created)

    async def _upload(
        self, tenant: str, arriving: AsyncIterator[pb.UploadAdapterRequest], context: Context
    ) -> tuple[Manifest, bool]:
        with self._seats.taken(tenant):
            requests = paced(arriving, self._pace)
            message = await _header(requests)
            header, chunks = _declared(message), _chunks(requests)
            fleet = await self._fleet.limits()
            prove = self._prover(tenant, message, context)
            if prove is not None:
                _alive(fleet)  # or all the bytes would come in vain
            return await self._store.upload(tenant, header, chunks, fleet, prove)

    def _prover(self, tenant: str, header: pb.UploadHeader, context: Context) -> Prove | None:
        """What the store asks before an upload becomes visible; None without a proof."""
        if not header.HasField("proof"):
            return None
        check_proof(header.proof)

        async def prove(version: Version) -> ProofResult:
            result = await self._computed(tenant, header.proof, version, context)
            if result.fault:
                raise InvalidAdapter(result.fault, reason="PROOF_FAILED", field="header.proof")
            return result

        return prove

    async def _computed(
        self, tenant: str, proof: pb.Proof, version: Version, context: Context
    ) -> ProofResult:
        _alive(await self._fleet.limits())
        remaining_s = context.time_remaining()
        priority = current_max_priority()
        result = await self._proofs.run(tenant, priority, proof, version, remaining_s)
        log.info(
            "proof computed",
            tenant=tenant,
            digest=version.digest,
            mean=result.mean,
            base_mean=result.base_mean,
            passed=not result.fault,
        )
        return result

    async def GetAdapter(self, request: pb.GetAdapterRequest, _: Context) -> pb.GetAdapterResponse:
        """Describe one version."""
        _given(request.adapter, "adapter")
        manifest = await self._store.get(current_tenant(), request.adapter)
        return pb.GetAdapterResponse(adapter=_adapter(manifest))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, _: Context
    ) -> pb.ListAdaptersResponse:
        """List the tenant's own adapters."""
        if request.page_size > MAX_PAGE:
            raise InvalidRequest(f"page_size: give at most {MAX_PAGE:,}", field="page_size")
        page = await self._store.list(current_tenant(), request.page_size, request.page_token)
        adapters = await self._batches.made(_adapter, page.adapters)
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=page.next_page_token)

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, _: Context
    ) -> pb.DeleteAdapterResponse:
        """Remove a version or a whole name."""
        _given(request.adapter, "adapter")
        deleted = await self._store.delete(current_tenant(), request.adapter)
        return pb.DeleteAdapterResponse(versions_deleted=deleted)

    async def SetAlias(self, request: pb.SetAliasRequest, _: Context) -> pb.SetAliasResponse:
        """Point an alias at a version."""
        _given(request.alias, "alias")
        _given(request.adapter, "adapter")
        manifest = await self._store.set_alias(current_tenant(), request.alias, request.adapter)
        return pb.SetAliasResponse(adapter=_adapter(manifest))

    async def DeleteAlias(
        self, request: pb.DeleteAliasRequest, _: Context
    ) -> pb.DeleteAliasResponse:
        """Remove an alias."""
        _given(request.alias, "alias")
        await self._store.delete_alias(current_tenant(), request.alias)
        return pb.DeleteAliasResponse()

    async def SetVisibility(
        self, request: pb.SetVisibilityRequest, _: Context
    ) -> pb.SetVisibilityResponse:
        """Publish an adapter, or make it private again."""
        _given(request.name, "name")
        visibility = _FROM_WIRE.get(request.visibility)
        if visibility is None:
            raise InvalidRequest(
                "visibility: give VISIBILITY_PRIVATE or VISIBILITY_PUBLISHED", field="visibility"
            )
        await self._store.set_visibility(current_tenant(), request.name, visibility)
        return pb.SetVisibilityResponse()

    async def VerifyAdapter(
        self, request: pb.VerifyAdapterRequest, context: Context
    ) -> pb.VerifyAdapterResponse:
        """Say how far an adapter is from what its trainer saw."""
        _given(request.adapter, "adapter")
        check_proof(request.proof)
        tenant = current_tenant()
        adapter = await self._store.resolve(tenant, request.adapter)
        result = await self._computed(tenant, request.proof, adapter, context)
        return pb.VerifyAdapterResponse(
            result=result_message(result), passed=not result.fault, reason=result.fault
        )


async def _header(requests: AsyncIterator[pb.UploadAdapterRequest]) -> pb.UploadHeader:
    async for request in requests:
        if request.HasField("header"):
            return request.header
        break
    raise InvalidRequest("an upload begins with its header: send that first", field="header")


def _declared(header: pb.UploadHeader) -> UploadHeader:
    if len(header.files) > _MAX_FILES:
        raise InvalidRequest(
            f"header.files: {len(header.files):,} files are declared: declare those of one adapter",
            field="header.files",
        )
    files = (FileDeclaration(file.name, file.size_bytes, file.sha256) for file in header.files)
    return UploadHeader(header.name, tuple(files), header.base_model)


async def _chunks(requests: AsyncIterator[pb.UploadAdapterRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if not request.HasField("chunk"):
            raise InvalidRequest("after the header an upload has chunks alone", field="chunk")
        if len(request.chunk) > MAX_CHUNK_BYTES:
            raise InvalidRequest(
                f"chunk: send at most {MAX_CHUNK_BYTES:,} bytes at a time", field="chunk"
            )
        yield request.chunk


def _alive(fleet: FleetLimits) -> None:
    """Raise Unavailable if no runner lives: a proof would wait until its deadline."""
    if not fleet:
        raise Unavailable(
            "no runner is alive that could compute the proof: try again when one is, or upload "
            "without a proof",
            reason="NO_RUNNER",
            retry_after_s=RETRY_AFTER_S,
        )


def _given(value: str, field: str) -> None:
    if not value:
        raise InvalidRequest(f"{field}: it is missing", field=field)


def _adapter(manifest: Manifest) -> pb.Adapter:
    adapter = pb.Adapter(
        tenant=manifest.tenant,
        name=manifest.name,
        version=manifest.version,
        digest=f"sha256:{manifest.digest}",
        size_bytes=manifest.size_bytes,
        max_rank=manifest.max_rank,
        target_modules=manifest.target_modules,
        visibility=_VISIBILITY[manifest.visibility],
        aliases=manifest.aliases,
        base_model=manifest.base_model,
        own_chat=bool(manifest.chat_sha256),
    )
    if manifest.proof is not None:
        adapter.proof.CopyFrom(result_message(manifest.proof))
    adapter.create_time.FromMicroseconds(round(manifest.create_time * 1e6))
    return adapter
