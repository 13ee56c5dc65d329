"""What adapters bring for chats, on its way from a store into a front's sequences."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator

import pytest
from front_rig import BOS, READY, Runner, asks, outputs, started, submission

from granatum.adapters_store.blobs.blobs import Blobs
from granatum.adapters_store.objects.location import open_objects
from granatum.runner.front.adapter_chats import AdapterChats, ChatAway
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.errors import Code
from granatum.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, StopConditions
from granatum.v1.runner_pb2 import DEPARTURE_LOAD_FAILED

DIGEST = "ab" * 32
SETTINGS = json.dumps(
    {"chat_template": "{{ bos_token }}{{ messages[0].content }}!", "end_tokens": ["<pad>"]}
).encode()
SHA256 = hashlib.sha256(SETTINGS).hexdigest()


@pytest.fixture
async def blobs() -> Blobs:
    objects = open_objects("memory://")
    await objects.put(f"blobs/{DIGEST}/1/chat.json", SETTINGS)
    return Blobs(objects)


@pytest.fixture
async def runner(tokenizer: Tokenizer, blobs: Blobs) -> AsyncIterator[Runner]:
    async with started(tokenizer, AdapterChats(blobs)) as runner:
        runner.engine.send(READY)
        await runner.front.loaded.wait()
        yield runner
    tokenizer.chat.close()


def chat() -> GenerateRequest:
    return GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content="yo")]))


async def test_a_chat_has_the_adapters_template_and_end_tokens(runner: Runner) -> None:
    stream = runner.session()
    own = {"adapter_digest": f"sha256:{DIGEST}", "adapter_chat": SHA256}
    await stream.write(submission(1, chat(), **own))
    submit = await asyncio.wait_for(runner.engine.receive(), 60)  # its server starts
    assert submit.prompt == (BOS, *b"yo!")  # type: ignore[union-attr]
    assert submit.stop_ids == {256, 258}  # type: ignore[union-attr]
    await stream.write(submission(2, asks("hi"), **own))
    assert (await runner.submitted()).stop_ids == {256, 258}
    await stream.write(submission(3, asks("hi", stop=StopConditions(ignore_eos=True)), **own))
    assert (await runner.submitted()).stop_ids == frozenset()
    await stream.write(submission(4, chat(), adapter_digest=f"sha256:{DIGEST}"))
    plain = await runner.submitted()
    assert (plain.prompt, plain.stop_ids) == ((BOS, *b"yo>"), {258})


async def test_what_the_store_does_not_bring_is_another_runners_turn(runner: Runner) -> None:
    stream = runner.session()
    own = {"adapter_digest": f"sha256:{'cd' * 32}", "adapter_chat": SHA256[::-1]}
    await stream.write(submission(1, chat(), **own))
    (output,) = await outputs(stream)
    assert output.departed == DEPARTURE_LOAD_FAILED
    assert output.cause.code == Code.NOT_FOUND
    assert "upload it again" in output.cause.message


async def test_equal_settings_are_fetched_once(blobs: Blobs) -> None:
    chats = AdapterChats(blobs)
    first = await chats.get(f"sha256:{DIGEST}", SHA256)
    assert first.end_tokens == ("<pad>",)
    not_stored = f"sha256:{'ef' * 32}"
    assert await chats.get(not_stored, SHA256) is first


async def test_a_store_that_hangs_is_given_up(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_: str, __: str) -> bytes:
        await asyncio.Event().wait()
        return b""

    monkeypatch.setattr(blobs, "read_chat", hang)
    with pytest.raises(ChatAway) as away:
        await AdapterChats(blobs, fetch_s=0.01).get(f"sha256:{DIGEST}", SHA256)
    assert away.value.cause.reason == "ADAPTER_LOAD_STALLED"
