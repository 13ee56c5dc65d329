"""Uploads that break off, come in odd chunks, or exceed a limit."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapter_files import Upload, config, good_upload, tensors, upload, weights
from uploading import BASE, SHAPE, Clock, chunks_of, files_under, header_of, put, send

from granatum.adapters_store.format.validate import Summary, validate
from granatum.adapters_store.limits import UploadLimits
from granatum.adapters_store.objects.objects import Objects
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidAdapter, Overloaded


async def _keys(objects: Objects) -> list[str]:
    found = []
    for prefix in ("tenants", "blobs", "published"):
        found += [listed.key for listed in await objects.listing(prefix)]
    return found


async def test_limits(objects: Objects) -> None:
    limits = UploadLimits(max_bytes=4000, max_rank=8, max_versions=2)
    store = AdapterStore(objects, BASE, limits)
    with pytest.raises(InvalidAdapter, match="more than the 4000 allowed"):
        await send(store, "acme", good_upload(SHAPE, rank=8))
    wide = upload(config(9, ("k_proj",)), weights(tensors(SHAPE, 9, ("k_proj",))))
    with pytest.raises(InvalidAdapter, match=r"rank 9 of .* above the limit of 8"):
        await send(store, "acme", wide)
    store = AdapterStore(objects, BASE, UploadLimits(max_versions=2))
    await put(store, "acme", "a")
    await put(store, "acme", "b")
    with pytest.raises(Overloaded, match=r"--max-adapter-versions.* delete old ones") as refused:
        await put(store, "acme", "c")
    assert refused.value.reason == "TENANT_VERSIONS"
    await store.delete("acme", "a")
    await put(store, "acme", "c")


async def test_a_tenant_s_bytes_are_bounded(objects: Objects, clock: Clock) -> None:
    size = len(good_upload(SHAPE).data)
    limits = UploadLimits(max_tenant_bytes=2 * size + size // 2)
    store = AdapterStore(objects, BASE, limits, now=clock)
    await put(store, "acme", "a", 1)
    await put(store, "acme", "b", 2)
    await put(store, "acme", "c", 2)  # equal bytes count once
    with pytest.raises(Overloaded, match=f"{limits.max_tenant_bytes:,} bytes") as refused:
        await put(store, "acme", "d", 4)
    assert refused.value.reason == "TENANT_STORED_BYTES"
    await put(store, "other", "d", 4)
    await store.delete("acme", "a")
    with pytest.raises(Overloaded, match="count for another hour"):
        await put(store, "acme", "d", 4)  # what was just deleted is stored still
    clock.pass_hours(3)
    await store.collect_garbage()
    await put(store, "acme", "d", 4)


async def test_deleting_is_no_way_around_the_limit_of_versions(
    objects: Objects, clock: Clock
) -> None:
    store = AdapterStore(objects, BASE, UploadLimits(max_versions=2), now=clock)
    for seed in range(4):
        await put(store, "acme", "a", seed)
        await store.delete("acme", "a")
    with pytest.raises(Overloaded, match="4 deleted versions"):
        await put(store, "acme", "a", 4)
    clock.pass_hours(3)
    await store.collect_garbage()
    assert (await put(store, "acme", "a", 4)).version == 5


async def test_bytes_that_are_there_may_come_again_whatever_the_limits(objects: Objects) -> None:
    size = len(good_upload(SHAPE).data)
    store = AdapterStore(objects, BASE, UploadLimits(max_versions=1, max_tenant_bytes=2 * size))
    assert (await put(store, "acme", "a", 1)).version == 1
    assert (await put(store, "acme", "a", 1)).version == 1


async def test_a_tenant_s_aliases_are_bounded(objects: Objects) -> None:
    store = AdapterStore(objects, BASE, UploadLimits(max_aliases=2))
    await put(store, "acme", "a")
    await store.set_alias("acme", "x", "a")
    await store.set_alias("acme", "y", "a")
    with pytest.raises(Overloaded, match="2 aliases") as refused:
        await store.set_alias("acme", "z", "a")
    assert refused.value.reason == "TENANT_ALIASES"
    await store.set_alias("acme", "y", "a@1")
    await store.delete_alias("acme", "x")
    await store.set_alias("acme", "z", "a")


async def test_uploads_that_the_disk_cannot_hold_are_refused(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = good_upload(SHAPE)
    free = 1.5 * len(good.data)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    arrived, going_on = asyncio.Event(), asyncio.Event()

    async def waits() -> AsyncIterator[bytes]:
        arrived.set()
        await going_on.wait()
        yield good.data

    first = asyncio.create_task(store.upload("acme", header_of(good), waits()))
    await arrived.wait()
    with pytest.raises(Overloaded, match="no room") as error:
        await put(store, "other", "bot")
    assert error.value.retry_after_s
    going_on.set()
    await first
    await put(store, "other", "bot")


async def test_a_tenant_s_uploads_are_checked_one_at_a_time(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, at_once, most = threading.Event(), Counter[str](), Counter[str]()

    def slow(config: Path, *others: Any) -> Summary:
        tenant = json.loads(config.read_bytes())["base_model_name_or_path"]
        for key in (tenant, "all"):
            at_once[key] += 1
            most[key] = max(most[key], at_once[key])
        checked.wait(0.02)
        for key in (tenant, "all"):
            at_once[key] -= 1
        return validate(config, *others)

    monkeypatch.setattr("granatum.adapters_store.store.validate", slow)
    uploads = [
        store.upload(tenant, header_of(sent), chunks_of(sent))
        for tenant in ("a", "b", "c")
        for n in range(3)
        for sent in [
            upload(config(base_model_name_or_path=tenant), weights(tensors(SHAPE, seed=n)), f"n{n}")
        ]
    ]
    await asyncio.gather(*uploads)
    assert (most["a"], most["b"], most["c"], most["all"]) == (1, 1, 1, 2)


async def test_hostile_patterns_take_none_of_a_router_s_time() -> None:
    """The router's process, in which the tokens of everybody's streams pass, hardly works."""
    store = AdapterStore.open("memory://", BASE)
    patterns = {f"{'[a-z_0-9]?' * 90}(.*)*x{n}": 1 for n in range(200)}
    hostile = upload(config(rank_pattern=patterns), weights(tensors(SHAPE)))
    begun = time.process_time()
    refused = await asyncio.gather(
        *(send(store, f"tenant-{n % 2}", hostile) for n in range(6)), return_exceptions=True
    )
    assert time.process_time() - begun < 1
    for error in refused:
        assert isinstance(error, InvalidAdapter)
        assert "rank_pattern: the pattern" in error.message
        assert "takes too long" in error.message


async def _breaks_off(upload: Upload, error: BaseException) -> AsyncIterator[bytes]:
    """Half of an upload, then `error`."""
    yield upload.data[: len(upload.data) // 2]
    raise error


@pytest.mark.parametrize("error", [RuntimeError("connection reset"), asyncio.CancelledError()])
async def test_an_aborted_upload_leaves_nothing(
    error: BaseException, store: AdapterStore, objects: Objects, tmp_path: Path
) -> None:
    good = good_upload(SHAPE)
    with pytest.raises(type(error)):
        await store.upload("acme", header_of(good), _breaks_off(good, error))
    assert await _keys(objects) == []
    assert files_under(tmp_path) == []


async def test_a_stalled_upload_can_be_cancelled(
    store: AdapterStore, objects: Objects, tmp_path: Path
) -> None:
    good, stalled = good_upload(SHAPE), asyncio.Event()

    async def stall() -> AsyncIterator[bytes]:
        yield good.data[:700]
        stalled.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(store.upload("acme", header_of(good), stall()))
    await stalled.wait()
    assert files_under(tmp_path) != []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _keys(objects) == []
    assert files_under(tmp_path) == []


async def test_chunks_of_any_size(store: AdapterStore) -> None:
    good = good_upload(SHAPE, "bot")
    for size in (1, 7, 10**6):
        small = good if size > 1 else good_upload(SHAPE, "bot", rank=1)
        await store.upload("acme", header_of(small), chunks_of(small, size))
