"""What is damaged or does not belong in the store harms nobody but its owner."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from uploading import BASE, Clock, put

from granatum.adapters_store.catalog.catalog import Visibility
from granatum.adapters_store.catalog.catalog_json import decode
from granatum.adapters_store.objects.objects import Objects
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import Internal, Unavailable

DIGEST = "a" * 64
STRAYS = [
    "blobs/Notes.txt",
    "blobs/x/y",
    f"blobs/{DIGEST}",
    f"blobs/{DIGEST}/Notes.txt",
    f"blobs/{DIGEST}/12/Notes.txt",
    f"blobs/{DIGEST}/twelve/adapter_config.json",
    f"blobs/{DIGEST}/-1/adapter_config.json",
    f"blobs/{DIGEST}/1_0/adapter_config.json",
    f"blobs/{DIGEST}/\u0661\u0662/adapter_config.json",
    f"blobs/{DIGEST}/{'9' * 5000}/adapter_config.json",
    f"blobs/{DIGEST.upper()}/12/adapter_config.json",
    f"blobs/{DIGEST}/12/deeper/adapter_config.json",
    "published/Notes.txt",
    f"published/{DIGEST}/acme",
    f"published/{DIGEST}/acme/twelve",
    f"published/{DIGEST}/Acme/12",
    f"published/{DIGEST}/acme/12/13",
    "published/short/acme/12",
    "tenants/Notes.txt",
    "tenants/Acme.json",
    "tenants/acme.json.orig",
    "tenants/acme/bot.json",
    "tenants/.json",
]


@pytest.fixture
def memory(clock: Clock) -> tuple[AdapterStore, Objects]:
    store = AdapterStore.open("memory://", BASE)
    store._now = clock
    return store, store._objects


@pytest.mark.parametrize("key", STRAYS)
async def test_a_stray_object_is_named_once_and_left_alone(
    key: str, memory: tuple[AdapterStore, Objects], clock: Clock
) -> None:
    store, objects = memory
    await put(store, "acme", "gone", 1)
    kept = await put(store, "acme", "bot", 2)
    await store.set_visibility("acme", "bot", Visibility.PUBLISHED)
    await store.delete("acme", "gone")
    await objects.put(key, b"notes")
    clock.pass_hours(10)
    with capture_logs() as logs:
        assert (await store.collect_garbage(0)).blobs == 1
        await store.collect_garbage(0)
    assert [entry["key"] for entry in logs if "key" in entry] == [key]
    assert await objects.get(key) is not None
    assert (await store.get("other", f"sha256:{kept.digest}")).name == "bot"


def _loop(path: Path) -> None:
    (path / "loop").symlink_to(path)


STRAY_FILES: dict[str, Callable[[Path], None]] = {
    "a name that is not UTF-8": lambda path: Path(os.fsdecode(bytes(path) + b"/\xff")).touch(),
    "a link that leads back": _loop,
    "a link to nowhere": lambda path: (path / "acme.json").symlink_to("nowhere"),
    "a link to itself": lambda path: (path / "acme.txt").symlink_to(path / "acme.txt"),
    "a directory": lambda path: (path / "bot.json").mkdir(),
    "odd characters": lambda path: (path / "a b#?%~[]\n.json").touch(),
}


@pytest.mark.parametrize("case", STRAY_FILES)
async def test_odd_files_in_a_local_store_are_left_alone(
    case: str, tmp_path: Path, clock: Clock
) -> None:
    store = AdapterStore.open(str(tmp_path / "store"), BASE)
    store._now = clock
    await put(store, "other", "gone", 1)
    kept = await put(store, "other", "bot", 2)
    await store.set_visibility("other", "bot", Visibility.PUBLISHED)
    await store.delete("other", "gone")
    for folder in ("blobs", f"blobs/{kept.digest}", "published", "tenants"):
        STRAY_FILES[case](tmp_path / "store" / folder)
    clock.pass_hours(10)
    assert (await store.collect_garbage(0)).blobs == 1
    await store.fetch(kept.digest, tmp_path / "cache")
    assert (await store.get("third", f"sha256:{kept.digest}")).name == "bot"


@pytest.mark.parametrize("folder", ["tenants", "blobs", "published"])
async def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    folder: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore.open(str(tmp_path / "store"), BASE)
    store._now = clock
    manifest = await put(store, "acme", "bot")
    await store.set_visibility("acme", "bot", Visibility.PUBLISHED)
    clock.pass_hours(10)
    scandir = os.scandir

    def fails(path: Path) -> Any:
        if str(path).endswith(f"store/{folder}"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(Unavailable):
        await store.collect_garbage(0)
    monkeypatch.undo()
    await store.fetch(manifest.digest, tmp_path / "cache")
    assert (await store.get("other", f"sha256:{manifest.digest}")).name == "bot"


async def test_a_stray_beside_an_adapter_s_files_does_not_hide_them(
    store: AdapterStore, objects: Objects, tmp_path: Path
) -> None:
    manifest = await put(store, "acme", "bot")
    await store.set_visibility("acme", "bot", Visibility.PUBLISHED)
    (blob, *_) = await objects.listing("blobs")
    for key in (f"{blob.key.rpartition('/')[0]}/Notes.txt", f"blobs/{manifest.digest}/Notes.txt"):
        await objects.put(key, b"notes")
    await objects.put(f"published/{manifest.digest}/Notes.txt", b"notes")
    await store.fetch(manifest.digest, tmp_path / "cache")
    assert (await store.get("other", f"sha256:{manifest.digest}")).name == "bot"


async def test_any_flipped_bit_of_a_catalog_is_noticed(
    memory: tuple[AdapterStore, Objects],
) -> None:
    store, objects = memory
    await put(store, "acme", "bot", 1)
    await store.set_alias("acme", "live", "bot")
    await put(store, "acme", "bat", 2)
    await store.delete("acme", "bat")
    stored = await objects.get("tenants/acme.json")
    assert stored is not None
    decode(stored.data)
    for bit in range(8 * len(stored.data)):
        damaged = bytearray(stored.data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Internal):
            decode(bytes(damaged))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format":2}', b'{"format":1}']
)
async def test_a_damaged_catalog_harms_its_tenant_alone(
    data: bytes, store: AdapterStore, objects: Objects, clock: Clock, tmp_path: Path
) -> None:
    ours = await put(store, "acme", "bot", 1)
    await store.set_visibility("acme", "bot", Visibility.PUBLISHED)
    theirs = await put(store, "other", "bot", 1)
    await store.set_visibility("other", "bot", Visibility.PUBLISHED)
    await objects.put("tenants/acme.json", data)
    for call in (store.get("acme", "bot"), store.list("acme"), put(store, "acme", "bot", 2)):
        with pytest.raises(Internal, match="operator must restore") as error:
            await call
        assert error.value.reason == "CATALOG_DAMAGED"
        assert "json" not in error.value.message
    assert (await store.get("third", f"sha256:{theirs.digest}")).tenant == "other"
    clock.pass_hours(10)
    await put(store, "other", "bot", 3)
    clock.pass_hours(10)
    with capture_logs() as logs:
        await store.collect_garbage(0)
    assert [entry["tenants"] for entry in logs if "tenants" in entry] == [["acme"]]
    await store.fetch(ours.digest, tmp_path / "cache")
    assert len(await objects.listing("published")) == 3


async def test_collection_goes_on_once_the_catalog_is_restored(
    store: AdapterStore, objects: Objects, clock: Clock
) -> None:
    await put(store, "acme", "bot", 1)
    await put(store, "other", "bot", 2)
    await store.delete("other", "bot")
    whole = await objects.get("tenants/acme.json")
    assert whole is not None
    await objects.put("tenants/acme.json", b"{}")
    clock.pass_hours(10)
    assert (await store.collect_garbage(0)).blobs == 0
    await objects.put("tenants/acme.json", whole.data)
    assert (await store.collect_garbage(0)).blobs == 1
    assert (await store.get("acme", "bot")).version == 1


async def test_a_catalog_without_checksum_is_read(
    memory: tuple[AdapterStore, Objects], clock: Clock
) -> None:
    """As it was written before there was one."""
    store, objects = memory
    version = {
        "version": 2,
        "digest": DIGEST,
        "size_bytes": 7,
        "max_rank": 4,
        "target_modules": ["q_proj"],
        "create_time": 1.5,
        "base_fingerprint": BASE.fingerprint,
    }
    adapters = {
        "bot": {"next_version": 3, "visibility": "published", "versions": [version]},
        "gone": {"next_version": 9, "visibility": "private", "versions": []},
    }
    old = {
        "format": 1,
        "revision": "r",
        "adapters": adapters,
        "aliases": {"live": {"name": "bot", "version": 2}},
        "retired": {"b" * 64: clock.now - 60},
    }
    await objects.put("tenants/acme.json", json.dumps(old).encode())
    found = await store.get("acme", "live")
    assert (found.full_name, found.size_bytes, found.elements) == ("acme/bot@2", 7, 0)
    assert found.visibility is Visibility.PUBLISHED
    assert (await put(store, "acme", "gone")).version == 9
    assert (await store.get("acme", "bot")).digest == DIGEST
