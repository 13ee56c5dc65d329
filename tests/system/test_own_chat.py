"""An adapter's folder with a chat template and an end token of its own, through real processes."""

import shutil
from pathlib import Path

import pytest
from cluster import Cluster

from granatum.client import Message
from granatum.examples.tasks import ADAPTER_TASKS
from granatum.examples.tokenizer import byte_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


async def test_a_chat_with_an_adapter_is_written_as_its_folder_says(
    cluster: Cluster, tmp_path: Path
) -> None:
    task = next(task for task in ADAPTER_TASKS if task.name == "shout")
    folder = tmp_path / "shout"
    shutil.copytree(task.path, folder)
    made = byte_tokenizer()
    made.chat_template = "{{ bos_token }}{{ messages[0]['content'] | lower }}>"
    made.add_special_tokens({"eos_token": "R"})
    made.save_pretrained(folder)
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as client:
        await client.upload("shout", folder)
        await client.upload("plain", task.path)
        shown = {adapter.name: adapter.own_chat for adapter in await client.list_adapters()}
        assert shown == {"shout": True, "plain": False}
        own = await client.complete([Message("user", "LANTERN")], adapter="shout", timeout=60)
        written = await client.complete("lantern>", adapter="plain", max_tokens=7, timeout=60)
    assert written.text == "LANTERN"
    assert own.text == "LANTE"  # R ends it
    assert own.end.reason == "stop"
    assert own.end.prompt_tokens == written.end.prompt_tokens
