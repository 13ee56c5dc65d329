"""What clients do while streams run: they leave, replace adapters, and ask for too much."""

import asyncio
from contextlib import suppress

import pytest
from cluster import Cluster
from streams import MINE, all_of, begun, figures, finish, long, requests, same, upload_mine

from granatum.examples.tasks import held_out_words
from granatum.v1.errors import (
    GranatumError,
    NotFound,
    Overloaded,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


async def test_deleted_and_replaced_adapters_finish_what_they_began(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    deleted, replaced, other = MINE
    async with cluster.client(key) as client:
        await upload_mine(client)
        wanted = [("granite>", deleted.name), ("lantern>", replaced.name)]
        undisturbed = await all_of(client, wanted)
        tasks = await begun([long(client, request) for request in wanted], 3)
        await client.delete(deleted.name)
        upload = await client.upload(replaced.name, other.path)
        assert upload.adapter.version == 2
        same(undisturbed, await asyncio.gather(*tasks))
        with pytest.raises(NotFound):
            await client.complete("granite>", adapter=deleted.name, max_tokens=3)
        anew = await client.complete("lantern>", adapter=replaced.name, stop=["\n"])
        assert anew.text == other.expected("lantern")


async def test_leaving_client_frees_what_it_held(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as client, cluster.client(admin) as operator:
        idle = (await figures(operator))["runner-0"]
        base = [long(client, (prompt, ""), 220) for prompt, _ in requests(6)]
        tasks = await begun(base, 2)
        for generation in base:
            generation.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, GranatumError):
                await task
        async with asyncio.timeout(10):
            while True:
                now = (await figures(operator))["runner-0"]
                if not now.sequences and not now.reserved and now.free_pages == idle.free_pages:
                    break
                await asyncio.sleep(0.1)


async def test_overload_queues_to_a_bound_then_refuses_with_a_hint(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router("router-0", "--max-queue", "4")
    cluster.start_runner("runner-0", "--max-batch", "2")
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as client:
        base = [(prompt, "") for prompt, _ in requests(12)]
        done = await asyncio.gather(
            *(finish(long(client, request)) for request in base), return_exceptions=True
        )
    refused = [error for error in done if isinstance(error, BaseException)]
    assert len(refused) == 12 - 2 - 4
    for error in refused:
        assert isinstance(error, Overloaded)
        assert error.retry_after_s


async def test_two_routers_at_once_never_overfill_a_runner(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    for name in ("router-0", "router-1"):
        cluster.start_router(name)
    for name in ("runner-0", "runner-1"):
        cluster.start_runner(name, "--max-batch", "8")
    await cluster.runners_alive(admin, 2, "router-1")
    words = held_out_words(200)
    fullest = 0
    async with (
        cluster.client(key, "router-0") as first,
        cluster.client(key, "router-1") as second,
        cluster.client(admin) as operator,
    ):
        clients = (first, second)
        tasks = [
            asyncio.create_task(clients[i % 2].complete(f"{word}>", max_tokens=16, timeout=120))
            for i, word in enumerate(words)
        ]
        while not all(task.done() for task in tasks):
            for runner in (await figures(operator)).values():
                fullest = max(fullest, runner.reserved, runner.sequences)
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
    assert fullest == 8
    left = [e for p in cluster.processes for e in p.events() if e.get("runner") and "cause" in e]
    assert "DEPARTURE_REFUSED" not in {event["cause"] for event in left}
