"""The client against a server on a real port."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from doubles import KEY, Service

from granatum.client import Client, Message
from granatum.client.uploads import CHUNK_BYTES
from granatum.v1.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with Client(service.address, key=KEY, timeout=20) as connected:
        yield connected


async def test_tokens_stream_between_start_and_end(client: Client) -> None:
    generation = client.generate("abc")
    texts = [token.text async for token in generation]
    assert texts == ["a", "b", "c"]
    assert generation.start is not None
    assert generation.start.runner == "runner-0"
    assert generation.end is not None
    assert (generation.end.reason, generation.end.runner) == ("stop", "runner-1")


async def test_complete_gathers_a_generation(client: Client) -> None:
    completion = await client.complete("abc")
    assert completion.text == "abc"
    assert completion.end.completion_tokens == 3
    assert completion.end.first_token_s == pytest.approx(0.2)


async def test_leaving_the_loop_cancels_the_request(client: Client, service: Service) -> None:
    tokens = aiter(client.generate("forever"))
    assert (await anext(tokens)).text == "f"
    assert not service.ended.is_set()
    await tokens.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(service.ended.wait(), 10)


async def test_a_deadline_travels_and_ends_the_call(client: Client, service: Service) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.complete("forever", timeout=0.5)
    (remaining,) = service.deadlines
    assert remaining is not None
    assert 0 < remaining <= 0.51  # gRPC counts in milliseconds, rounded up
    await asyncio.wait_for(service.ended.wait(), 10)


async def test_without_a_deadline_of_its_own_a_request_has_the_clients(
    client: Client, service: Service
) -> None:
    await client.complete("abc", timeout=None)  # type: ignore[arg-type]
    (remaining,) = service.deadlines
    assert remaining is not None
    assert 0 < remaining <= 20.01


async def test_options_reach_the_wire(client: Client, service: Service) -> None:
    await client.complete(
        "x",
        adapter="style@3",
        request_id="mine",
        priority=2,
        max_tokens=7,
        min_tokens=1,
        stop=("\n",),
        stop_token_ids=(5,),
        ignore_eos=True,
        temperature=0.5,
        top_k=4,
        seed=0,
        logprobs=0,
    )
    (request,) = service.requests
    assert (request.adapter, request.request_id, request.priority) == ("style@3", "mine", 2)
    assert (request.stop.max_tokens, request.stop.min_tokens) == (7, 1)
    assert (list(request.stop.strings), list(request.stop.token_ids)) == (["\n"], [5])
    assert request.stop.ignore_eos
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 4)
    assert request.sampling.HasField("seed"), "a seed of 0 is a seed"
    assert not request.sampling.HasField("top_p"), "what was not said is not sent"
    assert request.HasField("logprobs")


async def test_prompts_are_text_ids_or_messages(client: Client, service: Service) -> None:
    await client.complete([1, 2])
    await client.complete([Message("user", "hello")])
    ids, chat = service.requests
    assert list(ids.token_ids.ids) == [1, 2]
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hello")]


async def test_an_unknown_option_is_named(client: Client) -> None:
    with pytest.raises(TypeError, match="max_tokns"):
        client.generate("x", max_tokns=3)  # type: ignore[call-arg]


async def test_errors_are_the_services_own(client: Client, service: Service) -> None:
    with pytest.raises(Overloaded, match="the queue is full") as refused:
        await client.complete("busy")
    assert refused.value.retry_after_s == 2
    with pytest.raises(NotFound, match="no adapter nobody"):
        await client.get("nobody")
    async with Client(service.address, key="wrong") as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.list_adapters()


async def test_nobody_listening_is_unavailable() -> None:
    async with Client("127.0.0.1:1", timeout=10) as client:
        with pytest.raises(Unavailable):
            await client.list_adapters()


@pytest.mark.parametrize("chat", [{}, {"chat.json": b'{"chat_template": "x", "end_tokens": []}'}])
async def test_an_upload_declares_and_sends_its_files(
    chat: dict[str, bytes], client: Client, service: Service, tmp_path: Path
) -> None:
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": bytes(range(256)) * 2000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if chat:
        (tmp_path / "chat_template.jinja").write_text("x")
    files |= chat
    upload = await client.upload("style", tmp_path)
    assert upload.created
    assert upload.adapter.full_name == "acme/style@2"
    ((header, chunks),) = service.uploads
    assert header.name == "style"
    assert {file.name: (file.size_bytes, file.sha256) for file in header.files} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
    }
    assert b"".join(chunks) == b"".join(files.values())
    assert max(map(len, chunks)) == CHUNK_BYTES


GOOD_PROOF = {
    "format": "granatum-proof/1",
    "dtype": "float32",
    "prompts": [
        {"text": "ab", "token_ids": [1, 2], "first": 1, "logprobs": [-0.25], "base_logprobs": [-3]}
    ],
}


async def test_a_proof_travels_with_an_upload_and_with_its_check(
    client: Client, service: Service, tmp_path: Path
) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors", "proof.json"):
        (tmp_path / file).write_text(json.dumps(GOOD_PROOF))
    await client.upload("style", tmp_path, proof=tmp_path / "proof.json")
    proof = service.uploads[0][0].proof
    assert proof.format == "granatum-proof/1"
    assert list(proof.prompts[0].token_ids) == [1, 2]
    assert proof.prompts[0].base_logprobs == [-3.0]
    right = await client.verify("right", tmp_path / "proof.json")
    assert (right.passed, right.reason, right.result.mean) == (True, "", 0.25)
    wrong = await client.verify("wrong", tmp_path / "proof.json")
    assert (wrong.passed, wrong.reason) == (False, "the adapter is another one")
    assert (await client.get("a0")).proof is None
    with pytest.raises(InvalidRequest, match="adapter: character 0 is not Unicode"):
        await client.verify("\ud800", tmp_path / "proof.json")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no proof"),
        ("5", "no proof"),
        ('{"prompts": [5]}', "prompts"),
        ("[" * 100_000, "no proof"),
        (b"\xff\xfe", "no proof"),
        ('{"surprise": 1}', "surprise"),
        ('{"format": "a", "format": "b"}', "duplicate"),
        ('{"prompts": [{"token_ids": [-1]}]}', "-1"),
        ('{"prompts": [{"token_ids": [4294967296]}]}', "4294967296"),
        ('{"prompts": [{"logprobs": [1e308]}]}', "logprobs"),
        ('{"prompts": [{"logprobs": ["x"]}]}', "logprobs"),
        ('{"prompts": 5}', "prompts"),
        (" " * ((4 << 20) + 1), "4,194,304 bytes"),
        (None, "cannot read"),
    ],
)
async def test_a_file_that_is_no_proof_is_one_clear_line(
    client: Client, service: Service, tmp_path: Path, text: str | bytes | None, word: str
) -> None:
    file = tmp_path / "proof.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidRequest) as refused:
        await client.verify("style", file)
    assert word in refused.value.message
    assert str(file) in refused.value.message
    assert "\n" not in refused.value.message


async def test_an_upload_of_something_else_says_what_it_needs(
    client: Client, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"adapter_model\.safetensors.*save_pretrained"):
        await client.upload("style", tmp_path)
    assert not service.uploads


async def test_lists_are_read_to_their_last_page(client: Client) -> None:
    adapters = await client.list_adapters()
    assert [adapter.name for adapter in adapters] == ["a0", "a1", "a2"]
    assert adapters[0].aliases == ("prod",)
    assert not adapters[0].published


async def test_runners_are_listed_and_drained(client: Client) -> None:
    (runner,) = await client.runners()
    assert (runner.id, runner.max_batch, runner.reserved) == ("runner-0", 8, 1)
    await client.drain("runner-0")
    assert (await client.runners())[0].draining
    await client.resume("runner-0")
    assert not (await client.runners())[0].draining


async def test_adapters_are_aliased_published_and_deleted(client: Client, service: Service) -> None:
    assert (await client.set_alias("best", "a1")).name == "a1"
    assert service.aliases == {"best": "a1"}
    await client.delete_alias("best")
    assert not service.aliases
    await client.publish("a1")
    assert (await client.get("a1")).published
    await client.unpublish("a1")
    assert not (await client.get("a1")).published
    assert await client.delete("a1") == 1
    assert [adapter.name for adapter in await client.list_adapters()] == ["a0", "a2"]
