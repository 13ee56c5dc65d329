"""Versions, aliases, deletion and listing, on every kind of store."""

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_files import good_upload
from uploading import BASE, SHAPE, files_under, put, send

from granatum.adapters_store.catalog.catalog import Visibility
from granatum.adapters_store.objects.objects import Objects, Stored
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
)


async def _names(store: AdapterStore, tenant: str) -> list[str]:
    return [f"{m.name}@{m.version}" for m in (await store.list(tenant)).adapters]


async def test_upload_resolve_fetch(store: AdapterStore, tmp_path: Path, objects: Objects) -> None:
    sent = good_upload(SHAPE, "helper")
    manifest, created = await send(store, "acme", sent)
    assert created
    assert manifest == await store.resolve("acme", "helper")
    assert manifest.full_name == "acme/helper@1"
    assert manifest.size_bytes == len(sent.data)
    digests = b"".join(bytes.fromhex(file.sha256) for file in sent.files)
    assert manifest.digest == hashlib.sha256(digests).hexdigest()
    files = await store.fetch(manifest.digest, tmp_path / "cache")
    assert files.config.read_bytes() + files.weights.read_bytes() == sent.data
    assert await store.fetch(manifest.digest, tmp_path / "cache") == files
    assert files_under(tmp_path / "cache") == [files.config, files.weights]
    assert files_under(objects.scratch) == []


async def test_every_way_to_name_an_adapter(store: AdapterStore) -> None:
    first, second = await put(store, "acme", "bot", 1), await put(store, "acme", "bot", 2)
    await store.set_alias("acme", "live", "bot@1")
    for ref, version in (
        ("bot", 2),
        ("bot@1", 1),
        ("bot@2", 2),
        ("live", 1),
        (f"sha256:{first.digest}", 1),
        (f"sha256:{second.digest}", 2),
        ("acme/bot", 2),
        ("acme/bot@1", 1),
        ("acme/live", 1),
    ):
        assert (await store.resolve("acme", ref)).version == version, ref
    for ref in ("bot@3", "live@1", "bat", "acme/bat", "sha256:" + "0" * 64, "other/bot"):
        with pytest.raises(NotFound):
            await store.resolve("acme", ref)
    for ref in (
        "",
        "Bot",
        "bot@0",
        "bot@01",
        "bot@x",
        "bot@1@2",
        "../bot",
        "a/b/c",
        "bot@99999999999",
        "sha256:00",
        "sha256:" + "A" * 64,
        "/bot",
        "bot@",
        "b\u00f6t",
        "bot\n",
    ):
        with pytest.raises(InvalidRequest):
            await store.resolve("acme", ref)


async def test_the_same_bytes_again_are_no_new_version(store: AdapterStore) -> None:
    first = await send(store, "acme", good_upload(SHAPE, "bot", seed=1))
    again = await send(store, "acme", good_upload(SHAPE, "bot", seed=1))
    assert (first[1], again[1]) == (True, False)
    assert first[0] == again[0]
    await put(store, "acme", "bot", 2)
    assert (await put(store, "acme", "bot", 1)).version == 3  # the newest has other bytes
    assert (await put(store, "acme", "cat", 1)).version == 1


async def test_concurrent_uploads_get_distinct_versions(objects: Objects) -> None:
    stores = [AdapterStore(objects, BASE) for _ in range(4)]  # as many routers
    manifests = await asyncio.gather(
        *(put(stores[seed % 4], "acme", "bot", seed) for seed in range(8))
    )
    assert sorted(manifest.version for manifest in manifests) == list(range(1, 9))
    assert await _names(stores[0], "acme") == [f"bot@{n}" for n in range(1, 9)]
    for manifest in manifests:
        assert (await stores[1].get("acme", f"bot@{manifest.version}")).digest == manifest.digest


async def test_concurrent_uploads_of_the_same_bytes_are_one(objects: Objects) -> None:
    stores = [AdapterStore(objects, BASE) for _ in range(4)]
    sent = await asyncio.gather(*(send(s, "acme", good_upload(SHAPE, "bot")) for s in stores))
    assert [manifest.version for manifest, _ in sent] == [1] * 4
    assert sorted(created for _, created in sent) == [False, False, False, True]


async def test_a_change_whose_answer_got_lost_is_made_once(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store made the change, and what came back was the refusal of its repetition."""
    swap = objects.swap

    async def loses_answer(key: str, data: bytes, known: Stored | None) -> None:
        assert await swap(key, data, known) is not None

    store = AdapterStore(objects, BASE)
    monkeypatch.setattr(objects, "swap", loses_answer)
    manifest, created = await send(store, "acme", good_upload(SHAPE, "bot"))
    assert (manifest.version, created) == (1, True)
    assert await store.delete("acme", "bot") == 1
    assert (await put(AdapterStore(objects, BASE), "acme", "bot")).version == 2


async def test_a_name_is_an_adapter_or_an_alias_even_in_a_race(objects: Objects) -> None:
    stores = [AdapterStore(objects, BASE) for _ in range(2)]
    await put(stores[0], "acme", "bot")
    results = await asyncio.gather(
        put(stores[0], "acme", "live", 1),
        stores[1].set_alias("acme", "live", "bot"),
        return_exceptions=True,
    )
    assert [isinstance(result, AlreadyExists) for result in results].count(True) == 1


async def test_aliases(store: AdapterStore) -> None:
    await put(store, "acme", "bot", 1)
    pointed = await store.set_alias("acme", "live", "bot")
    assert (pointed.version, pointed.aliases) == (1, ("live",))
    await put(store, "acme", "bot", 2)
    assert (await store.get("acme", "live")).version == 1  # it stays where it was pointed
    await store.set_alias("acme", "best", "bot@2")
    assert (await store.set_alias("acme", "live", "bot")).aliases == ("best", "live")
    with pytest.raises(AlreadyExists, match="adapter's name"):
        await store.set_alias("acme", "bot", "bot@1")
    with pytest.raises(AlreadyExists, match="is an alias"):
        await put(store, "acme", "live", 3)
    with pytest.raises(NotFound):
        await store.set_alias("acme", "next", "bot@3")
    with pytest.raises(NotFound):
        await store.set_alias("acme", "next", "live")  # an alias of a version, not of an alias
    with pytest.raises(InvalidRequest):
        await store.set_alias("acme", "../x", "bot")
    with pytest.raises(InvalidRequest):
        await store.set_alias("acme", "next", "sha256:" + "0" * 64)
    await store.delete_alias("acme", "live")
    with pytest.raises(NotFound):
        await store.get("acme", "live")
    with pytest.raises(NotFound):
        await store.delete_alias("acme", "live")
    await put(store, "acme", "live", 3)


async def test_deleted_versions_are_never_given_again(store: AdapterStore) -> None:
    for seed in (1, 2, 3):
        await put(store, "acme", "bot", seed)
    await store.set_alias("acme", "live", "bot@3")
    assert await store.delete("acme", "bot@3") == 1
    for ref in ("bot@3", "live"):
        with pytest.raises(NotFound):
            await store.get("acme", ref)
    assert (await store.get("acme", "bot")).version == 2
    assert (await put(store, "acme", "bot", 4)).version == 4
    assert await store.delete("acme", "bot") == 3
    assert await _names(store, "acme") == []
    for ref in ("bot", "bot@1"):
        with pytest.raises(NotFound):
            await store.delete("acme", ref)
    assert (await put(store, "acme", "bot", 1)).version == 5


async def test_a_name_used_anew_is_private(store: AdapterStore) -> None:
    await put(store, "acme", "bot", 1)
    await store.set_visibility("acme", "bot", Visibility.PUBLISHED)
    await store.delete("acme", "bot")
    assert (await put(store, "acme", "bot", 2)).visibility is Visibility.PRIVATE


async def test_listing_in_pages(store: AdapterStore) -> None:
    for name, seed in (("b", 1), ("a", 2), ("b", 3), ("c", 4), ("b", 5)):
        await put(store, "acme", name, seed)
    await put(store, "other", "a")
    await store.set_alias("acme", "live", "b@2")
    expected = ["a@1", "b@1", "b@2", "b@3", "c@1"]
    assert await _names(store, "acme") == expected
    seen, token = [], ""
    while True:
        page = await store.list("acme", 2, token)
        seen += [f"{m.name}@{m.version}{''.join(m.aliases)}" for m in page.adapters]
        token = page.next_page_token
        if not token:
            break
        assert len(page.adapters) == 2
    assert seen == ["a@1", "b@1", "b@2live", "b@3", "c@1"]
    assert (await store.list("nobody")).adapters == ()
    with pytest.raises(InvalidRequest):
        await store.list("acme", 2, "b")


async def test_another_base_model_s_adapters_are_not_served(objects: Objects) -> None:
    await put(AdapterStore(objects, BASE), "acme", "bot")
    store = AdapterStore(objects, replace(BASE, name="new", fingerprint="1" * 64))
    assert (await store.get("acme", "bot")).version == 1
    with pytest.raises(PreconditionFailed, match="uploaded for another base model"):
        await store.resolve("acme", "bot")


async def test_bytes_uploaded_for_another_model_become_a_version_of_their_own(
    objects: Objects,
) -> None:
    """So an adapter that is refused for its base model can be uploaded again for this one."""
    trained = replace(BASE, name="instruct", fingerprint="0" * 16 + "1" * 16 + "0" * 32)
    here, there = AdapterStore(objects, BASE), AdapterStore(objects, trained)
    await put(here, "acme", "bot")
    with pytest.raises(PreconditionFailed, match=r"instruct.*\(other weights\)") as caught:
        await there.resolve("acme", "bot")
    assert caught.value.reason == "OTHER_BASE_MODEL"
    again = await put(there, "acme", "bot")
    assert again.version == 2
    for name in ("bot", f"sha256:{again.digest}"):
        assert (await there.resolve("acme", name)).version == 2
    assert (await put(there, "acme", "bot")).version == 2, "once is enough"
