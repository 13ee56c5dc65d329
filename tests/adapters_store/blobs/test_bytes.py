"""What happens to an adapter's bytes: PEFT's own files, large ones, damage, garbage, an outage."""

import asyncio
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import config, good_upload, tensors, upload, weights
from peft import LoraConfig, get_peft_model
from s3_server import S3Server
from transformers import AutoConfig, AutoModelForCausalLM
from uploading import BASE, SHAPE, Clock, chunks_of, files_under, header_of, put, send

from granatum.adapters_store.catalog.catalog import Visibility
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.objects.location import open_objects
from granatum.adapters_store.objects.objects import Objects
from granatum.adapters_store.store import AdapterStore
from granatum.models.base_model import BaseModel
from granatum.v1.errors import InvalidRequest, NotFound, Unavailable


async def test_what_peft_saves(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    family = AutoConfig.for_model("qwen3", num_attention_heads=4, num_key_value_heads=2, **shape)
    family.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=6,
        target_modules="all-linear",
        rank_pattern={"mlp.*": 10},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_config(family).to(torch.bfloat16), lora)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    fields = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    saved = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    store = AdapterStore.open("memory://", BaseModel.from_config(tmp_path / "base"))
    manifest, _ = await send(store, "acme", upload(fields, saved))
    assert manifest.max_rank == 10
    assert len(manifest.target_modules) == 7


async def test_bytes_over_several_ranges(store: AdapterStore, tmp_path: Path) -> None:
    """Larger than a part of a multipart upload and a range of a download."""
    features = {**BASE.features, "q_proj": (20_000, 20_000)}
    wide = BaseModel("wide", 1, features, "2" * 64)
    store._base = wide
    parts = tensors(type(SHAPE)(1, features), 256, ("q_proj",))
    large = upload(config(256, ("q_proj",)), weights(parts), "large")
    assert len(large.data) > 40_000_000
    manifest, _ = await store.upload("acme", header_of(large), chunks_of(large, 1 << 20))
    files = await store.fetch(manifest.digest, tmp_path / "cache")
    assert files.config.read_bytes() + files.weights.read_bytes() == large.data


async def test_damaged_bytes_are_not_served_until_they_are_uploaded_again(
    store: AdapterStore, objects: Objects, tmp_path: Path
) -> None:
    manifest = await put(store, "acme", "bot")
    (key,) = [
        listed.key
        for listed in await objects.listing(f"blobs/{manifest.digest}")
        if listed.key.endswith(".safetensors")
    ]
    stored = await objects.get(key)
    assert stored is not None
    for damaged in (stored.data[:-1] + b"?", stored.data[:-1], b""):
        await objects.put(key, damaged)
        with pytest.raises(Unavailable, match="damaged: upload it again") as error:
            await store.fetch(manifest.digest, tmp_path / "cache")
        assert error.value.reason == "ADAPTER_CORRUPTED"
        assert files_under(tmp_path / "cache") == []
    _, created = await send(store, "acme", good_upload(SHAPE, "bot"))  # what the message says
    assert not created
    await store.fetch(manifest.digest, tmp_path / "cache")


async def test_fetching_what_is_not_there(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await store.fetch("0" * 64, tmp_path)
    with pytest.raises(InvalidRequest):
        await store.fetch("../tenants/acme", tmp_path)


async def test_concurrent_fetches_of_one_adapter(store: AdapterStore, tmp_path: Path) -> None:
    manifest = await put(store, "acme", "bot")
    found = await asyncio.gather(
        *(store.fetch(manifest.digest, tmp_path / "cache") for _ in range(5))
    )
    assert len(set(found)) == 1
    assert len(files_under(tmp_path / "cache")) == 2


async def _digests(objects: Objects) -> set[str]:
    return {listed.key.split("/")[1] for listed in await objects.listing("blobs")}


async def test_garbage_is_collected_after_its_grace(
    store: AdapterStore, objects: Objects, clock: Clock, tmp_path: Path
) -> None:
    kept, gone = await put(store, "acme", "kept", 1), await put(store, "acme", "gone", 2)
    shared = await put(store, "acme", "shared", 3)
    await put(store, "other", "shared", 3)
    clock.pass_hours(10)
    await store.delete("acme", "gone")
    await store.delete("acme", "shared")
    assert (await store.collect_garbage(grace_s=7200)).blobs == 0
    clock.pass_hours(1.9)
    assert (await store.collect_garbage(grace_s=7200)).blobs == 0
    await store.fetch(gone.digest, tmp_path / "resumed")  # a stream goes on elsewhere
    clock.pass_hours(0.2)
    collected = await store.collect_garbage(grace_s=7200)
    assert (collected.blobs, collected.bytes) == (1, gone.size_bytes)
    assert await _digests(objects) == {kept.digest, shared.digest}
    with pytest.raises(NotFound):
        await store.fetch(gone.digest, tmp_path / "cache")
    assert (await store.collect_garbage(grace_s=7200)).blobs == 0


async def test_an_upload_left_halfway_is_collected(
    store: AdapterStore, objects: Objects, clock: Clock
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        await objects.put(f"blobs/{'a' * 64}/{int(clock.now // 3600)}/{name}", b"bytes")
    assert (await store.collect_garbage(0)).blobs == 0
    clock.pass_hours(2)
    assert (await store.collect_garbage(0)).blobs == 1


async def test_collection_spares_an_upload_of_old_bytes(
    store: AdapterStore, objects: Objects, clock: Clock, tmp_path: Path
) -> None:
    """The bytes are old and nobody's; the upload refers to them while they are being deleted."""
    await put(store, "acme", "bot")
    await store.delete("acme", "bot")
    clock.pass_hours(10)
    listing, deleted = objects.listing, objects.delete
    manifests: list[Manifest] = []

    async def delete_late(keys: list[str]) -> None:
        if keys and not manifests:
            manifests.append(await put(store, "other", "bot"))
        await deleted(keys)

    objects.delete = delete_late  # type: ignore[method-assign, assignment]
    assert (await store.collect_garbage(3600)).blobs == 1
    assert len(await listing("blobs")) == 2
    await store.fetch(manifests[0].digest, tmp_path / "cache")


async def test_bytes_stored_again_are_kept_once(
    store: AdapterStore, objects: Objects, clock: Clock, tmp_path: Path
) -> None:
    for tenant in ("a", "b", "c"):
        manifest = await put(store, tenant, "bot")
        clock.pass_hours(3)
    assert len(await objects.listing("blobs")) == 6
    assert (await store.collect_garbage(3600)).blobs == 2
    assert len(await objects.listing("blobs")) == 2
    await store.fetch(manifest.digest, tmp_path / "cache")


async def test_hints_of_what_is_private_again_are_collected(
    store: AdapterStore, objects: Objects, clock: Clock
) -> None:
    bot, bat = await put(store, "acme", "bot", 1), await put(store, "acme", "bat", 2)
    for name in ("bot", "bat"):
        await store.set_visibility("acme", name, Visibility.PUBLISHED)
    clock.pass_hours(10)
    await store.set_visibility("acme", "bat", Visibility.PRIVATE)
    await store.collect_garbage(0)
    (hint,) = await objects.listing("published")
    assert bot.digest in hint.key
    assert (await store.get("other", f"sha256:{bot.digest}")).name == "bot"
    with pytest.raises(NotFound):
        await store.get("other", f"sha256:{bat.digest}")


async def test_an_upload_that_took_too_long_to_store(
    store: AdapterStore, objects: Objects, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = objects.put_file

    async def slow(key: str, path: Path) -> None:
        clock.pass_hours(0.2)
        await put_file(key, path)

    monkeypatch.setattr(objects, "put_file", slow)
    with pytest.raises(Unavailable, match="took too long"):
        await put(store, "acme", "bot")
    assert (await store.list("acme")).adapters == ()


async def test_the_store_away(s3_environment: Callable[[S3Server], None], tmp_path: Path) -> None:
    server = S3Server()
    try:
        s3_environment(server)
        store = AdapterStore.open(f"s3://{server.make_bucket()}", BASE)
        manifest = await put(store, "acme", "bot")
    finally:
        server.stop()
    for call in (
        store.resolve("acme", "bot"),
        store.list("acme"),
        store.delete("acme", "bot"),
        put(store, "acme", "bot", 2),
        store.fetch(manifest.digest, tmp_path / "cache"),
        store.collect_garbage(),
    ):
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="away: try again") as error:
            await call
        assert error.value.retry_after_s
        assert time.monotonic() - begun < 10


async def test_no_such_bucket(s3: S3Server, s3_environment: Callable[[S3Server], None]) -> None:
    s3_environment(s3)
    with pytest.raises(Unavailable):
        await put(AdapterStore.open("s3://no-such-bucket", BASE), "acme", "bot")


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "nonsense://x", "/proc/nothing/here"])
def test_urls_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(InvalidRequest, match="adapter store"):
        open_objects(url)


async def test_a_directory_outlives_its_process(tmp_path: Path) -> None:
    manifest = await put(AdapterStore.open(str(tmp_path), BASE), "acme", "bot")
    again = AdapterStore.open(f"file://{tmp_path}", BASE)
    assert await again.get("acme", "bot") == manifest


WRITER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from uploading import BASE, put
from granatum.adapters_store.store import AdapterStore

async def main():
    store = AdapterStore.open(sys.argv[2], BASE)
    for seed in range(5):
        await put(store, "acme", "bot", int(sys.argv[3]) + seed)

asyncio.run(main())
"""


async def test_what_a_killed_router_left_is_cleared(tmp_path: Path, clock: Clock) -> None:
    objects = open_objects(str(tmp_path))
    (objects.scratch / "upload-x").mkdir()
    (objects.scratch / "upload-x" / "adapter_config.json").write_text("{}")
    (objects.scratch / "link").write_text("")
    store = AdapterStore(objects, BASE, now=clock)
    clock.now = time.time()
    await store.collect_garbage()
    assert len(files_under(tmp_path)) == 2
    clock.pass_hours(25)
    await store.collect_garbage()
    assert files_under(tmp_path) == []


async def test_several_processes_share_a_directory(tmp_path: Path) -> None:
    library = Path(__file__).parents[2] / "lib"
    commands = [
        [sys.executable, "-c", WRITER, str(library), str(tmp_path), str(100 * n)] for n in range(3)
    ]
    processes = [await asyncio.create_subprocess_exec(*command) for command in commands]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    page = await AdapterStore.open(str(tmp_path), BASE).list("acme")
    assert [manifest.version for manifest in page.adapters] == list(range(1, 16))
    assert len({manifest.digest for manifest in page.adapters}) == 15


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, granatum.adapters_store.store, granatum.adapters_store.blobs.garbage;"
        "print(sorted({'torch', 'triton', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
