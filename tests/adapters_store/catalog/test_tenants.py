"""What belongs to one tenant does not exist for another, unless published."""

import pytest
from uploading import put

from granatum.adapters_store.catalog.catalog import Visibility
from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidRequest, NotFound


class _Isolation:
    """Everything that `other` may try on `acme`'s private adapter, and on one that never was."""

    def __init__(self, store: AdapterStore, name: str, digest: str) -> None:
        self.attempts = {
            "get": store.get("other", name),
            "get version": store.get("other", f"{name}@1"),
            "get by tenant": store.get("other", f"acme/{name}"),
            "get by tenant and version": store.get("other", f"acme/{name}@1"),
            "get by digest": store.get("other", f"sha256:{digest}"),
            "get by alias": store.get("other", "live"),
            "get by tenant and alias": store.get("other", "acme/live"),
            "resolve": store.resolve("other", f"acme/{name}"),
            "alias": store.set_alias("other", "mine", name),
            "alias of a version": store.set_alias("other", "mine", f"{name}@1"),
            "delete alias": store.delete_alias("other", "live"),
            "delete": store.delete("other", name),
            "delete version": store.delete("other", f"{name}@1"),
            "publish": store.set_visibility("other", name, Visibility.PUBLISHED),
        }


async def test_tenants_are_apart(store: AdapterStore) -> None:
    manifest = await put(store, "acme", "secret")
    await store.set_alias("acme", "live", "secret")
    before = await store.list("acme")
    existing = _Isolation(store, "secret", manifest.digest).attempts
    missing = _Isolation(store, "absent", "0" * 64).attempts
    for attempt in existing:
        messages = []
        for call, name, digest in (
            (existing[attempt], "secret", manifest.digest),
            (missing[attempt], "absent", "0" * 64),
        ):
            with pytest.raises(NotFound) as error:
                await call
            messages.append(error.value.message.replace(name, "NAME").replace(digest, "DIGEST"))
        assert messages[0] == messages[1], attempt
    for ref in ("acme/secret", "acme/secret@1", f"sha256:{manifest.digest}"):
        for call in (store.delete("other", ref), store.set_alias("other", "mine", ref)):
            with pytest.raises(InvalidRequest):
                await call
    assert (await store.list("other")).adapters == ()
    assert await store.list("acme") == before


async def test_the_same_name_and_bytes_of_two_tenants(store: AdapterStore) -> None:
    ours, theirs = await put(store, "acme", "bot"), await put(store, "other", "bot")
    assert ours.digest == theirs.digest
    assert (await store.get("other", f"sha256:{ours.digest}")).tenant == "other"
    await store.delete("other", "bot")
    assert (await store.get("acme", "bot")).digest == ours.digest
    with pytest.raises(NotFound):
        await store.get("other", f"sha256:{ours.digest}")


async def test_published_adapters(store: AdapterStore) -> None:
    first = await put(store, "acme", "bot", 1)
    await put(store, "acme", "private", 3)
    await store.set_alias("acme", "live", "bot")
    await store.set_visibility("acme", "bot", Visibility.PUBLISHED)
    second = await put(store, "acme", "bot", 2)
    assert second.visibility is Visibility.PUBLISHED
    for ref, version in (
        ("acme/bot", 2),
        ("acme/bot@1", 1),
        (f"sha256:{first.digest}", 1),
        (f"sha256:{second.digest}", 2),
    ):
        seen = await store.resolve("other", ref)
        assert (seen.version, seen.aliases) == (version, ())  # whose aliases are their tenant's
    assert (await store.get("acme", "acme/bot@1")).aliases == ("live",)
    for ref in ("bot", "acme/private", "acme/live"):
        with pytest.raises(NotFound):
            await store.resolve("other", ref)
    assert (await store.list("other")).adapters == ()
    await store.set_visibility("acme", "bot", Visibility.PRIVATE)
    for ref in ("acme/bot", f"sha256:{first.digest}"):
        with pytest.raises(NotFound):
            await store.resolve("other", ref)
    with pytest.raises(NotFound):
        await store.set_visibility("acme", "bat", Visibility.PUBLISHED)


async def test_bad_tenant_names(store: AdapterStore) -> None:
    for tenant in ("", "../acme", "Acme", "a" * 65):
        for call in (
            put(store, tenant, "bot"),
            store.get(tenant, "bot"),
            store.list(tenant),
            store.set_alias(tenant, "live", "bot"),
            store.delete_alias(tenant, "live"),
            store.delete(tenant, "bot"),
            store.set_visibility(tenant, "bot", Visibility.PUBLISHED),
        ):
            with pytest.raises(InvalidRequest, match="tenant name"):
                await call
