"""The adapter store from the router's side: away, or with rubbish to collect."""

import asyncio
from pathlib import Path

import pytest
from router_box import Box
from wire_adapters import error_of, generated, upload

from granatum.adapters_store.store import AdapterStore
from granatum.models.base_model import BaseModel
from granatum.router.collection import Collection
from granatum.router.placement.placement import Lease, LeaseKind
from granatum.router.placement.registry import Registry
from granatum.service import tasks
from granatum.v1.errors import Unavailable


def break_store(box: Box) -> Path:
    """Put a file where the store's directory was; the directory's new place."""
    store = box.folder / "store"
    away = store.rename(box.folder / "away")
    store.write_text("not a directory")
    return away


def mend_store(box: Box, away: Path) -> None:
    (box.folder / "store").unlink()
    away.rename(box.folder / "store")


async def test_while_the_store_is_away_known_adapters_serve_and_others_are_unavailable(
    box: Box,
) -> None:
    await box.router()
    await box.runner("a")
    for name in ("known", "unknown"):
        await upload(box, box.acme, name)
    assert await generated(box, box.acme, "known") == "acme/known@1"
    away = break_store(box)
    assert await generated(box, box.acme, "known") == "acme/known@1"
    assert await generated(box, box.acme, "") == ""
    error = await error_of(generated(box, box.acme, "unknown"))
    assert isinstance(error, Unavailable)
    assert error.retry_after_s
    mend_store(box, away)
    assert await generated(box, box.acme, "unknown") == "acme/unknown@1"
    await upload(box, box.acme, "known", seed=2)
    assert await generated(box, box.acme, "known") == "acme/known@2"


async def test_one_router_at_a_time_collects(box: Box, registry: Registry) -> None:
    base = BaseModel.from_config(box.folder)
    store = AdapterStore.open((box.folder / "store").as_uri(), base)
    turn = Lease(LeaseKind.CLAIM, "task:collection", "another")
    collections = []

    async def collect() -> None:
        collections.append(await store.collect_garbage())

    collection = Collection(collect, registry, "mine", interval_s=0.01)
    assert await registry.claim(turn)
    await collection.collect()
    assert not collections
    await registry.release([turn])
    running = asyncio.create_task(collection.run())
    async with asyncio.timeout(10):
        while len(collections) < 2:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    async with asyncio.timeout(registry.terms.lease_s / 2):
        while not await registry.claim(turn):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("error", [ValueError("not ours"), Unavailable("away"), KeyError("x")])
async def test_whatever_collection_meets_it_tries_again(
    registry: Registry, error: Exception
) -> None:
    attempts = []

    async def collect() -> None:
        attempts.append(1)
        raise error

    running = asyncio.create_task(Collection(collect, registry, "mine", interval_s=0.01).run())
    async with asyncio.timeout(10):
        while len(attempts) < 3:
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_collection_that_fails_in_any_way_ends_no_router(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_PAUSE_S", 0.01)
    tries = 0

    async def fails(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise ValueError("a stray object")

    monkeypatch.setattr(AdapterStore, "collect_garbage", fails)
    router = await box.router(collect_s=0.01)
    await box.runner("a")
    async with asyncio.timeout(10):
        while tries < 3:
            await asyncio.sleep(0.01)
    assert not router.background.done()
    assert await generated(box, box.acme, "") == ""
