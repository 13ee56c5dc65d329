"""A whole fleet under mutual TLS, and what is refused in plaintext."""

import asyncio
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from cluster import CLUSTER_KEY, START_S, Cluster, Process

from granatum.client.client import Client
from granatum.examples.tasks import ADAPTER_TASKS
from granatum.v1.errors import InvalidRequest, Unavailable
from granatum.v1.runner_pb2 import SessionRequest
from granatum.v1.runner_pb2_grpc import RunnerServiceStub
from granatum.v1.transport import Tls, bearer, open_channel

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def flags(prefix: str, tls: Tls) -> list[str]:
    """What a process is told of its certificates: to serve with, or for the other side."""
    files = {"cert": tls.cert, "key": tls.key, "ca": tls.ca}
    return [part for what, file in files.items() for part in (f"--{prefix}-{what}", str(file))]


async def test_every_hop_is_mutual_tls_and_strangers_stay_out(
    cluster: Cluster, tmp_path: Path
) -> None:
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    router, runner = ours.issue("router"), ours.issue("runner")
    cluster.start_router("router-0", *flags("tls", router), *flags("runner", router))
    serving = cluster.start_runner("runner-0", *flags("tls", runner), *flags("router", runner))
    impostor = others.issue("runner")
    stranger = cluster.start_runner(
        "runner-1",
        *flags("tls", impostor),
        *flags("router", Tls(impostor.cert, impostor.key, runner.ca)),
    )
    cluster.tls = ours.issue("client")
    await cluster.runners_alive(admin, 1)
    task = ADAPTER_TASKS[0]
    async with cluster.client(key) as client:
        await client.upload(task.name, task.path)
        told = await client.complete(task.prompt("granite"), adapter=task.name, stop=[task.stop])
        assert told.text == task.expected("granite")
        assert told.end.runner == "runner-0"
    for tls in (None, Tls(ca=cluster.tls.ca), others.issue("client")):
        await refused_by_router(Client(cluster.addresses["router-0"], key=key, tls=tls))
        await refused_by_runner(f"127.0.0.1:{serving.port()}", tls)
    await logged(stranger, "no router answers")
    async with cluster.client(admin) as operator:
        assert [r.id for r in await operator.runners()] == ["runner-0"]


async def refused_by_router(client: Client) -> None:
    async with client:
        with pytest.raises(Unavailable):
            await client.complete("granite>", max_tokens=1, timeout=5)


async def refused_by_runner(address: str, tls: Tls | None) -> None:
    async with open_channel(address, tls) as channel:
        call = RunnerServiceStub(channel).Session(metadata=bearer(CLUSTER_KEY), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.write(SessionRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def logged(process: Process, event: str) -> None:
    async with asyncio.timeout(START_S):
        while not any(line.get("event") == event for line in process.events()):
            await asyncio.sleep(0.1)


def test_plaintext_beyond_loopback_is_refused_unless_asked_for(cluster: Cluster) -> None:
    cluster.tenant_key("acme")
    cluster.start_router()
    for start in (cluster.spawn_router, cluster.start_runner):
        process = start("exposed", "--listen", "0.0.0.0:0")
        assert process.wait() == 1
        (error,) = (e["error"] for e in process.events() if e["event"] == "cannot serve")
        assert "beyond this machine" in error
        assert "--insecure" in error
    assert cluster.start_router("asked", "--listen", "0.0.0.0:0", "--insecure").port()
    with pytest.raises(InvalidRequest, match="beyond this machine"):
        open_channel("192.0.2.1:7070")
