"""Uploads over the wire: bad and aborted ones leave nothing; others' adapters do not exist."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from adapter_files import Shape, Upload, good_upload
from bad_uploads import BAD_UPLOADS
from cluster import Cluster
from s3_server import S3Server

from granatum.client.client import Client
from granatum.client.requests import Options
from granatum.examples.tasks import ADAPTER_TASKS, BASE_MODEL
from granatum.models.base_model import BaseModel
from granatum.v1 import adapters_pb2, adapters_pb2_grpc
from granatum.v1.errors import InvalidRequest, NotFound, Unavailable
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.transport import bearer, open_channel

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

BASE = BaseModel.from_config(BASE_MODEL)
SHAPE = Shape(BASE.num_layers, BASE.features)
CHUNK = 100_000


async def messages(upload: Upload) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    """An upload as the wire carries it, whatever it declares."""
    files = [
        adapters_pb2.FileDeclaration(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256)
        for f in upload.files
    ]
    header = adapters_pb2.UploadHeader(name=upload.name, files=files)
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for begin in range(0, len(upload.data), CHUNK):
        yield adapters_pb2.UploadAdapterRequest(chunk=upload.data[begin : begin + CHUNK])


def blobs(directory: Path) -> list[Path]:
    """Every file of the store."""
    return [path for path in (directory / "store").rglob("*") if path.is_file()]


async def test_bad_uploads_are_refused_by_name_and_leave_nothing(cluster: Cluster) -> None:
    assert len(BAD_UPLOADS) >= 30
    key = cluster.tenant_key("acme")
    cluster.start_router()
    async with open_channel(cluster.addresses["router-0"]) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        for name, bad in BAD_UPLOADS.items():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.UploadAdapter(messages(bad.make(SHAPE)), metadata=bearer(key))
            error = from_rpc_error(refused.value)
            assert isinstance(error, InvalidRequest), f"{name}: {error!r}"
            assert bad.message in error.message, name
        listed = await stub.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=bearer(key))
    assert not listed.adapters
    assert not blobs(cluster.directory)


async def test_aborted_upload_leaves_nothing(cluster: Cluster) -> None:
    key = cluster.tenant_key("acme")
    cluster.start_router()
    upload = good_upload(SHAPE, rank=64)
    half_way = asyncio.Event()

    async def half() -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
        sent = 0
        async for message in messages(upload):
            if sent > len(upload.data) // 2:
                half_way.set()
                await asyncio.Event().wait()
            sent += len(message.chunk)
            yield message

    async with open_channel(cluster.addresses["router-0"]) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        call = stub.UploadAdapter(half(), metadata=bearer(key))
        await half_way.wait()
        call.cancel()
        async with asyncio.timeout(20):
            while blobs(cluster.directory):
                await asyncio.sleep(0.1)
        listed = await stub.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=bearer(key))
    assert not listed.adapters


async def test_private_adapters_do_not_exist_for_others(cluster: Cluster) -> None:
    mine, theirs = cluster.tenant_key("acme"), cluster.tenant_key("globex")
    admin = cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    task = next(task for task in ADAPTER_TASKS if task.tenant == "acme")
    async with cluster.client(mine) as owner, cluster.client(theirs) as other:
        adapter = (await owner.upload(task.name, task.path)).adapter
        await owner.set_alias("prod", task.name)
        names = (task.name, f"{task.name}@1", "prod", adapter.digest, f"acme/{task.name}")
        for name in (*names, f"acme/{task.name}@1"):
            for attempt in attempts(other, name):
                with pytest.raises(NotFound):
                    await attempt()
        assert not await other.list_adapters()
        for name in names:
            answer = await owner.complete("granite>", adapter=name, stop=["\n"])
            assert answer.text == task.expected("granite"), name
        await owner.publish(task.name)
        answer = await other.complete("granite>", adapter=f"acme/{task.name}", stop=["\n"])
        assert answer.text == task.expected("granite")
        await owner.unpublish(task.name)
        with pytest.raises(NotFound):
            await other.complete("granite>", adapter=f"acme/{task.name}")


def attempts(client: Client, name: str) -> list[Callable[[], Awaitable[object]]]:
    """Everything that one can try with an adapter's name."""
    own: list[Callable[[], Awaitable[object]]] = [
        lambda: client.complete("granite>", adapter=name, max_tokens=2),
        lambda: client.get(name),
    ]
    if ":" in name or "/" in name:  # deleting and pointing take the tenant's own names alone
        return own
    return [*own, lambda: client.delete(name), lambda: client.set_alias("mine", name)]


async def test_store_away_serves_what_is_resident(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server()
    try:
        environment = {
            "AWS_ENDPOINT": server.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        cluster.store_url = f"s3://{server.make_bucket()}"
        key, admin = cluster.tenant_key("acme"), cluster.admin_key()
        cluster.start_router()
        cluster.start_runner()
        await cluster.runners_alive(admin, 1)
        resident, absent = [task for task in ADAPTER_TASKS if task.tenant == "acme"][:2]
        async with cluster.client(key) as client:
            for task in (resident, absent):
                await client.upload(task.name, task.path)
            options = Options(adapter=resident.name, stop=["\n"])
            before = await client.complete("granite>", **options)
            assert before.text == resident.expected("granite")
            server.stop()
            after = await client.complete("lantern>", **options)
            assert after.text == resident.expected("lantern")
            with pytest.raises(Unavailable) as away:
                await client.complete("lantern>", adapter=absent.name, timeout=8)
            assert away.value.retry_after_s
    finally:
        server.stop()
