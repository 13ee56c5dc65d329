"""A catalog's memory of what was deleted, and how quickly a large one answers."""

import asyncio
import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from uploading import BASE, Clock, put

from granatum.adapters_store.catalog.catalog import (
    MAX_EMPTIED,
    AdapterHistory,
    Alias,
    Catalog,
    Version,
    Visibility,
)
from granatum.adapters_store.catalog.catalog_json import decode, encode
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.limits import DEFAULT_LIMITS
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import NotFound


def _version(number: int, seed: int) -> Version:
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    return Version(number, digest, 10, 8, ("q_proj", "v_proj"), float(seed), BASE.fingerprint, 640)


def _catalog(versions: int, aliases: int) -> Catalog:
    """Half of the versions under one name, the others each under its own."""
    half = versions // 2
    many = tuple(_version(n + 1, n) for n in range(half))
    names = {f"n{n:05d}": AdapterHistory(2, versions=(_version(1, half + n),)) for n in range(half)}
    return Catalog(
        adapters={"bot": AdapterHistory(half + 1, Visibility.PUBLISHED, many), **names},
        aliases={f"a{n:04d}": Alias("bot", n % half + 1) for n in range(aliases)},
    )


def test_a_catalog_is_read_as_it_was_written() -> None:
    catalog = _catalog(1300, 10).add_version("new", _version(0, 9999), DEFAULT_LIMITS)
    catalog, _ = catalog.delete("n00001", None, 7.5)
    catalog, _ = catalog.delete("bot", 3, 8.5)
    catalog = catalog.forget_deleted(8.0)
    assert decode(encode(catalog, "r1")) == (catalog, "r1")
    assert decode(encode(Catalog(), "r2")) == (Catalog(), "r2")


async def test_a_deleted_name_is_forgotten_but_its_numbers_are_not(clock: Clock) -> None:
    store = AdapterStore.open("memory://", BASE)
    store._now = clock
    for seed in range(3):
        await put(store, "acme", "bot", seed)
    await store.delete("acme", "bot")
    clock.pass_hours(3)
    await store.collect_garbage()
    assert "bot" not in (await store._tenants.read("acme")).adapters
    stored = await store._objects.get("tenants/acme.json")
    assert stored is not None
    assert b"bot" not in stored.data
    assert (await put(store, "acme", "bot", 7)).version == 4
    with pytest.raises(NotFound):
        await store.get("acme", "bot@3")


def test_deleted_names_take_bounded_memory_and_keep_their_numbers() -> None:
    catalog, times = Catalog(), 3 * MAX_EMPTIED
    for n in range(times):
        catalog = catalog.add_version(f"n{n}", _version(0, n % 5), DEFAULT_LIMITS)
        catalog, _ = catalog.delete(f"n{n}", None, float(n))
    assert len(catalog.adapters) == MAX_EMPTIED
    assert len(encode(catalog, "")) < 100_000
    for n in range(0, times, 7):
        newest = catalog.add_version(f"n{n}", _version(0, 1), DEFAULT_LIMITS).newest(f"n{n}")
        assert newest is not None
        assert newest.version > 1


def test_what_is_just_deleted_is_remembered() -> None:
    catalog = Catalog().add_version("bot", _version(0, 1), DEFAULT_LIMITS)
    catalog, _ = catalog.delete("bot", None, 100.0)
    assert catalog.forget_deleted(100.0) == catalog
    assert not catalog.forget_deleted(100.5).adapters


LARGE = _catalog(5_000, 1_000)
STEPS: dict[str, Callable[[Catalog], object]] = {
    "a page": lambda c: [
        c.aliases_of(name, version.version)
        for (name, version), _ in zip(c.versions_after("bot", 9), range(1000), strict=False)
    ],
    "an alias": lambda c: c.set_alias("a0001", "bot", 77, DEFAULT_LIMITS).aliases_of("bot", 77),
    "a digest": lambda c: c.find_digest(_version(1, 7).digest),
    "a deletion": lambda c: c.delete("bot", None, 1.0),
    "an upload": lambda c: c.add_version("bot", _version(0, 1), DEFAULT_LIMITS),
    "the published": lambda c: c.published,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_on_a_large_catalog_is_short(step: str) -> None:
    """Some milliseconds; seconds where something is looked for once per version."""
    fresh = replace(LARGE)  # nothing is derived of it yet
    begun = time.process_time()
    STEPS[step](fresh)
    assert time.process_time() - begun < 0.1


async def test_a_large_catalog_is_listed_page_by_page() -> None:
    store = AdapterStore.open("memory://", BASE)
    await store._objects.put("tenants/acme.json", encode(LARGE, "r"))
    seen: list[Manifest] = []
    begun, token = time.process_time(), ""
    while True:
        page = await store.list("acme", 1000, token)
        seen += page.adapters
        token = page.next_page_token
        if not token:
            break
    assert time.process_time() - begun < 2
    assert [(m.name, m.version) for m in seen] == [(n, v.version) for n, v in LARGE.versions()]
    pointed = {(at.name, at.version): alias for alias, at in LARGE.aliases.items()}
    assert [m.aliases for m in seen] == [
        (pointed[m.name, m.version],) if (m.name, m.version) in pointed else () for m in seen
    ]
    assert seen[0].elements == 640


async def test_many_listings_at_once_leave_turns_to_others() -> None:
    store = AdapterStore.open("memory://", BASE)
    await store._objects.put("tenants/acme.json", encode(LARGE, "r"))
    await store.list("acme", 1)  # reads the catalog
    listings = asyncio.gather(*(store.list("acme", 1000) for _ in range(20)))
    longest = 0.0
    gc.freeze()  # else a collection is the longest turn
    while not listings.done():
        begun = time.thread_time()
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time() - begun)
    gc.unfreeze()
    assert longest < 0.01
    assert {len(page.adapters) for page in listings.result()} == {1000}
