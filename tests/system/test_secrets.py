"""Nothing secret reaches a log, however calls and processes fail."""

import asyncio
import secrets

import pytest
from cluster import CLUSTER_KEY, Cluster
from redis import Redis

from granatum.client.client import Client
from granatum.client.requests import Message
from granatum.examples.tasks import ADAPTER_TASKS
from granatum.v1.errors import GranatumError

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

PROMPT = "thesecretofthetenant>"
TASK = ADAPTER_TASKS[0]


async def test_no_log_has_a_key_a_password_or_a_prompt(cluster: Cluster) -> None:
    password, wrong = secrets.token_urlsafe(24), f"gk-{secrets.token_urlsafe(24)}"
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    assert cluster.redis is not None
    Redis(port=cluster.redis_port).config_set("requirepass", password)
    cluster.redis.url = f"redis://:{password}@127.0.0.1:{cluster.redis_port}/0"
    cluster.start_router()
    runners = {name: cluster.start_runner(name) for name in ("runner-0", "runner-1")}
    await cluster.runners_alive(admin, 2)
    async with cluster.client(key) as client, cluster.client(admin) as operator:
        await client.upload(TASK.name, TASK.path)
        made = await good_calls(client)
        for stranger in (client, Client(cluster.addresses["router-0"], key=wrong)):
            await bad_calls(stranger)
        stream = client.generate(PROMPT, max_tokens=200, ignore_eos=True, timeout=60)
        async for token in stream:
            made += token.text
            if stream.start is not None and (running := runners.pop(stream.start.runner, None)):
                running.busiest_child().kill()  # its engine, whose end it logs
        assert stream.end is not None
        assert stream.end.resumptions
        cluster.redis.kill()
        with pytest.raises(GranatumError):
            await client.complete(PROMPT, max_tokens=3, timeout=2)
        with pytest.raises(GranatumError):
            await operator.runners()
    for url in (f"redis://:{password}/@127.0.0.1:1", f"rdis://:{password}@127.0.0.1:1"):
        cluster.redis.url = url
        misled = cluster.spawn_router("misled")
        assert misled.wait() == 1
        assert [event["event"] for event in misled.events()] == ["cannot serve"]
    logs = {path.name: path.read_text() for path in cluster.directory.glob("*.log")}
    assert "sequence left its runner" in logs["router-0-1.log"]
    for name, text in logs.items():
        for secret in (key, admin, wrong, CLUSTER_KEY, password, PROMPT.rstrip(">"), made[:24]):
            assert secret not in text, f"{secret} is in {name}"


async def good_calls(client: Client) -> str:
    """What was generated."""
    completions = await asyncio.gather(
        client.complete(PROMPT, max_tokens=30, ignore_eos=True),
        client.complete(PROMPT, adapter=TASK.name, max_tokens=30, logprobs=2),
        client.complete([Message("user", PROMPT)], max_tokens=30, request_id="chat"),
    )
    return completions[0].text


async def bad_calls(client: Client) -> None:
    """Refused by the router, or by the runner."""
    for call in (
        client.complete(PROMPT, adapter="missing"),
        client.complete(PROMPT * 1000, max_tokens=3),
        client.complete(PROMPT, top_p=7.0),
        client.complete(PROMPT, stop=[""]),
        client.complete([Message("user", PROMPT), Message("", PROMPT)], request_id="x" * 10_000),
        client.runners(),
        client.upload("../" + TASK.name, TASK.path),
    ):
        with pytest.raises(GranatumError):
            await call
