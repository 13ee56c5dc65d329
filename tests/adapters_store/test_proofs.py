"""A proof between an upload's bytes and its version: refused bytes are nowhere but in the quota."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_files import good_upload
from uploading import BASE, SHAPE, Clock, chunks_of, files_under, header_of, put

from granatum.adapters_store.catalog.catalog import AdapterHistory, Catalog, Version
from granatum.adapters_store.catalog.catalog_json import decode, encode
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.limits import UploadLimits
from granatum.adapters_store.objects.location import open_objects
from granatum.adapters_store.proof import ProofResult
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidAdapter, NotFound, Overloaded

RESULT = ProofResult(40, 1e-5, 2e-5, 1e-6, 2e-6, 1.5, 1_800_000_000.0)
Prove = Callable[[Version], Awaitable[ProofResult]]


async def accept(_: Version) -> ProofResult:
    return RESULT


async def refuse(_: Version) -> ProofResult:
    raise InvalidAdapter("off", reason="PROOF_FAILED")


async def send(store: AdapterStore, prove: Prove, seed: int = 0) -> tuple[Manifest, bool]:
    upload = good_upload(SHAPE, "bot", seed=seed)
    return await store.upload("acme", header_of(upload), chunks_of(upload), (), prove)


async def test_the_bytes_can_be_had_before_the_name(store: AdapterStore, tmp_path: Path) -> None:
    asked = []

    async def prove(version: Version) -> ProofResult:
        asked.append(version)
        files = await store.fetch(version.digest, tmp_path / "runner")
        assert files.weights.exists()
        for name in ("bot", f"sha256:{version.digest}"):
            with pytest.raises(NotFound):
                await store.resolve("acme", name)
        return RESULT

    manifest, created = await send(store, prove)
    assert created
    assert manifest.proof == RESULT
    assert (asked[0].digest, asked[0].elements) == (manifest.digest, manifest.elements)
    assert await store.resolve("acme", "bot") == manifest
    await store.set_alias("acme", "live", "bot")
    assert (await store.get("acme", "live")).proof == RESULT


async def test_refused_bytes_are_collected(store: AdapterStore, clock: Clock) -> None:
    with pytest.raises(InvalidAdapter):
        await send(store, refuse)
    assert not (await store.list("acme")).adapters
    assert (await store.collect_garbage()).blobs == 0  # an upload of them may be under way
    clock.pass_hours(3)
    assert (await store.collect_garbage()).blobs == 1
    assert (await send(store, accept))[0].version == 1


async def test_refused_bytes_count_until_they_are_collected(clock: Clock, tmp_path: Path) -> None:
    size = len(good_upload(SHAPE, "bot").data)
    limits = UploadLimits(max_tenant_bytes=2 * size + size // 2)
    store = AdapterStore(open_objects(str(tmp_path)), BASE, limits, clock)
    for seed in (1, 2, 2, 1):
        with pytest.raises(InvalidAdapter):
            await send(store, refuse, seed)
    stored = len(files_under(tmp_path / "blobs"))
    for prove in (refuse, accept):
        with pytest.raises(Overloaded) as full:
            await send(store, prove, 3)
        assert full.value.reason == "TENANT_STORED_BYTES"
    assert len(files_under(tmp_path / "blobs")) == stored
    assert (await send(store, accept, 2))[0].version == 1  # what is there takes no more room
    clock.pass_hours(3)
    await store.collect_garbage()
    assert (await send(store, accept, 3))[0].version == 2


async def test_the_newest_bytes_may_be_proven_later(store: AdapterStore) -> None:
    first = await put(store, "acme", "bot")
    assert first.proof is None
    with pytest.raises(InvalidAdapter):
        await send(store, refuse)
    assert await store.get("acme", "bot") == first
    proven, created = await send(store, accept)
    assert (proven, created) == (replace(first, proof=RESULT), False)
    assert await store.get("acme", "bot") == proven
    assert await put(store, "acme", "bot") == proven  # an upload without a proof keeps the last


def test_proofs_are_read_as_they_were_written_and_old_catalogs_have_none() -> None:
    plain = Version(1, "a" * 64, 10, 8, ("q_proj",), 1.0, BASE.fingerprint)
    proven = replace(plain, version=2, digest="b" * 64, proof=RESULT)
    catalog = Catalog({"bot": AdapterHistory(3, versions=(plain, proven))})
    assert decode(encode(catalog, "r")) == (catalog, "r")
    old = Catalog({"bot": AdapterHistory(2, versions=(plain,))})
    assert decode(encode(old, "r")) == (old, "r")
