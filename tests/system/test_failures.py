"""The failure table of docs/architecture.md: what breaks, and what the client sees."""

import asyncio
from pathlib import Path

import pytest
from cluster import Cluster, healthy
from streams import (
    MINE,
    all_of,
    begun,
    figures,
    finish,
    interrupted,
    long,
    requests,
    same,
    upload_mine,
)

from granatum.examples.tasks import held_out_words
from granatum.v1.errors import (
    DeadlineExceeded,
    GranatumError,
    Unavailable,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

STREAMS = 16


async def test_killed_runner_loses_and_repeats_nothing(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    runners = {name: cluster.start_runner(name) for name in ("runner-0", "runner-1")}
    await cluster.runners_alive(admin, 2)
    async with cluster.client(key) as client:
        await upload_mine(client)
        wanted = requests(STREAMS)
        undisturbed = await all_of(client, wanted)
        tasks = await begun([long(client, request) for request in wanted], 10)
        async with cluster.client(admin) as operator:
            busiest = max((await figures(operator)).values(), key=lambda r: r.reserved)
        runners[busiest.id].kill()
        disturbed = await asyncio.gather(*tasks)
    same(undisturbed, disturbed)
    assert sum(c.end.resumptions for c in disturbed) >= STREAMS // 2
    assert {c.end.runner for c in disturbed} == {"runner-0", "runner-1"} - {busiest.id}


async def test_drained_runner_hands_its_streams_over(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    for name in ("runner-0", "runner-1"):
        cluster.start_runner(name)
    await cluster.runners_alive(admin, 2)
    async with cluster.client(key) as client, cluster.client(admin) as operator:
        wanted, undisturbed, tasks, busiest = await interrupted(client, operator, 8)
        await operator.drain(busiest.id)
        same(undisturbed, await asyncio.gather(*tasks))
        async with asyncio.timeout(20):
            while (await figures(operator))[busiest.id].sequences:
                await asyncio.sleep(0.1)
        later = await finish(long(client, wanted[0], 3))
        assert later.end.runner != busiest.id


async def test_only_runner_gone_is_unavailable_with_a_hint(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    runner = cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as client:
        generation = client.generate("granite>", max_tokens=220, ignore_eos=True, timeout=8)
        (task,) = await begun([generation], 3)
        runner.kill()
        with pytest.raises(Unavailable) as gone:
            await task
        assert gone.value.retry_after_s


async def test_killed_router_ends_its_streams_and_frees_what_they_held(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    doomed = cluster.start_router("router-0")
    cluster.start_router("router-1")
    cluster.start_runner()
    await cluster.runners_alive(admin, 1, "router-1")
    wanted = requests(4)
    async with (
        cluster.client(key, "router-0") as first,
        cluster.client(key, "router-1") as second,
        cluster.client(admin, "router-1") as operator,
    ):
        await upload_mine(second)
        undisturbed = await all_of(second, wanted)
        lost = await begun([long(first, request, 220) for request in wanted], 3)
        kept = await begun([long(second, request) for request in wanted], 3)
        doomed.kill()
        for task in lost:
            with pytest.raises(Unavailable):
                await task
        same(undisturbed, await asyncio.gather(*kept))
        async with asyncio.timeout(30):
            while (status := (await figures(operator))["runner-0"]).reserved or status.sequences:
                await asyncio.sleep(0.2)


async def test_redis_restarted_empty_disturbs_no_stream(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as client:
        await upload_mine(client)
        wanted = requests(8)
        undisturbed = await all_of(client, wanted)
        tasks = await begun([long(client, request) for request in wanted], 3)
        assert cluster.redis is not None
        cluster.redis.kill()
        await asyncio.sleep(1.0)
        cluster.start_redis()
        after = asyncio.create_task(finish(long(client, wanted[0])))
        same(undisturbed, await asyncio.gather(*tasks))
        same(undisturbed[:1], [await after])


async def test_redis_away_disturbs_no_stream_and_placement_heals(cluster: Cluster) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as client:
        wanted = requests(4)
        base = [(prompt, "") for prompt, _ in wanted]
        undisturbed = await all_of(client, base)
        tasks = await begun([long(client, request) for request in base], 3)
        assert cluster.redis is not None
        cluster.redis.freeze()
        same(undisturbed, await asyncio.gather(*tasks))
        with pytest.raises(GranatumError) as away:
            await client.complete("granite>", max_tokens=3, timeout=3)
        assert isinstance(away.value, Unavailable | DeadlineExceeded)
        cluster.redis.thaw()
        await finish(long(client, wanted[0]))


async def test_health_proves_a_step(cluster: Cluster) -> None:
    admin = cluster.admin_key()
    cluster.start_router()
    runner = cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    address = f"127.0.0.1:{runner.port()}"
    await health_becomes(address, True)
    assert await healthy(cluster.addresses["router-0"])
    engine = runner.busiest_child()
    engine.suspend()
    await health_becomes(address, False)
    engine.resume()
    await health_becomes(address, True)


async def health_becomes(address: str, expected: bool) -> None:
    async with asyncio.timeout(30):
        while await healthy(address) is not expected:
            await asyncio.sleep(0.2)


async def test_a_frozen_engine_gets_no_work_and_its_streams_go_on_elsewhere(
    cluster: Cluster,
) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    runners = {name: cluster.start_runner(name) for name in ("runner-0", "runner-1")}
    await cluster.runners_alive(admin, 2)
    async with cluster.client(key) as client, cluster.client(admin) as operator:
        wanted, undisturbed, tasks, busiest = await interrupted(client, operator, 8)
        engine = runners[busiest.id].busiest_child()
        engine.suspend()
        try:
            same(undisturbed, await asyncio.gather(*tasks))
            async with asyncio.timeout(20):
                while busiest.id in await figures(operator):  # for its lease at most
                    await asyncio.sleep(0.1)
            later = await all_of(client, wanted)
        finally:
            engine.resume()
        same(undisturbed, later)
        assert busiest.id not in {c.start.runner for c in later}
        await cluster.runners_alive(admin, 2)
        same(undisturbed, await all_of(client, wanted))


async def test_a_runner_of_another_store_gets_an_adapter_once_at_most(
    cluster: Cluster, tmp_path: Path
) -> None:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cluster.start_runner("runner-z", "--store", elsewhere.as_uri())  # ties go to the highest id
    cluster.start_runner("runner-a")
    await cluster.runners_alive(admin, 2)
    async with cluster.client(key) as client, cluster.client(admin) as operator:
        await upload_mine(client)
        for task in (*MINE, *MINE):
            word = held_out_words(1)[0]
            reply = await client.complete(f"{word}>", adapter=task.name, stop=["\n"])
            assert reply.text == task.expected(word)
            assert reply.start.runner == "runner-a"
        async with asyncio.timeout(20):
            while not (await figures(operator))["runner-z"].trouble:
                await asyncio.sleep(0.1)
