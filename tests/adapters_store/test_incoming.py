"""Uploads that break off, come in odd chunks, or exceed a limit."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from adapter_files import Upload, config, good_upload, tensors, upload, weights
from uploading import BASE, SHAPE, chunks_of, files_under, header_of, put, send

from granatum.adapters_store.limits import Limits
from granatum.adapters_store.objects import Objects
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidAdapter, Overloaded


async def _keys(objects: Objects) -> list[str]:
    found = []
    for prefix in ("tenants", "blobs", "published"):
        found += [listed.key for listed in await objects.listing(prefix)]
    return found


async def test_limits(objects: Objects) -> None:
    limits = Limits(max_bytes=4000, max_rank=8, max_versions=2)
    store = AdapterStore(objects, BASE, limits)
    with pytest.raises(InvalidAdapter, match="more than the 4000 allowed"):
        await send(store, "acme", good_upload(SHAPE, rank=8))
    wide = upload(config(9, ("k_proj",)), weights(tensors(SHAPE, 9, ("k_proj",))))
    with pytest.raises(InvalidAdapter, match=r"rank 9 of .* above the limit of 8"):
        await send(store, "acme", wide)
    store = AdapterStore(objects, BASE, Limits(max_versions=2))
    await put(store, "acme", "a")
    await put(store, "acme", "b")
    with pytest.raises(Overloaded, match="delete old ones"):
        await put(store, "acme", "c")
    await store.delete("acme", "a")
    await put(store, "acme", "c")


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
