"""What an upload may bring for chats: checked, stored, found again, and collected."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_files import good_upload
from uploading import BASE, SHAPE, header_of, put

from granatum.adapters_store.blobs.incoming import FileDeclaration, UploadHeader
from granatum.adapters_store.catalog.catalog_json import decode, encode
from granatum.adapters_store.chat import MAX_CHAT_BYTES, ChatSettings, check_chat
from granatum.adapters_store.store import AdapterStore
from granatum.examples.tokenizer import byte_tokenizer
from granatum.v1.errors import InvalidAdapter, Unavailable

GENERATION = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
GOOD = {"chat_template": "{{ messages[0].content }}", "end_tokens": ["</s>", "a"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path, model: Path) -> AdapterStore:
    return AdapterStore.open((tmp_path / "store").as_uri(), replace(BASE, folder=model))


async def upload(store: AdapterStore, chat: bytes, name: str = "style") -> Any:
    given = good_upload(SHAPE, name)
    declared = FileDeclaration("chat.json", len(chat), hashlib.sha256(chat).hexdigest())
    header = UploadHeader(name, (*header_of(given).files, declared))

    async def chunks() -> Any:
        yield given.data + chat

    return (await store.upload("acme", header, chunks()))[0]


async def test_chat_settings_are_a_part_of_the_adapter(store: AdapterStore, tmp_path: Path) -> None:
    chat = json.dumps(GOOD).encode()
    plain = await put(store, "acme", "plain")
    styled = await upload(store, chat)
    assert plain.chat_sha256 == ""
    assert styled.chat_sha256 == hashlib.sha256(chat).hexdigest()
    assert styled.digest != plain.digest
    assert (await store.get("acme", "style")).chat_sha256 == styled.chat_sha256
    files = await store.fetch(styled.digest, tmp_path / "cache")
    assert files.config.with_name("chat.json").read_bytes() == chat
    data = await store._blobs.read_chat(styled.digest, styled.chat_sha256)
    assert ChatSettings.parse(data) == ChatSettings(GOOD["chat_template"], ("</s>", "a"))  # type: ignore[arg-type]


async def test_damaged_chat_settings_are_not_served(store: AdapterStore, tmp_path: Path) -> None:
    styled = await upload(store, json.dumps(GOOD).encode())
    (stored,) = (tmp_path / "store").glob("blobs/*/*/chat.json")
    stored.write_bytes(b"{}")
    with pytest.raises(Unavailable) as damaged:
        await store._blobs.read_chat(styled.digest, styled.chat_sha256)
    assert damaged.value.reason == "ADAPTER_CORRUPTED"
    with pytest.raises(Unavailable):
        await store.fetch(styled.digest, tmp_path / "cache")


async def test_a_catalog_remembers_them_and_an_older_one_has_none(store: AdapterStore) -> None:
    await put(store, "acme", "plain")
    styled = await upload(store, json.dumps(GOOD).encode())
    catalog = await store._tenants.read("acme")
    again, _ = decode(encode(catalog, "r"))
    assert again == catalog
    found = again.newest("style")
    assert found is not None
    assert found.chat_sha256 == styled.chat_sha256


BAD: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "is no JSON"),
    "another thing": (b"[]", "JSON object"),
    "another field": (b'{"template": ""}', "chat_template and end_tokens"),
    "a number": (b'{"chat_template": 1}', "give text"),
    "half a character": (rb'{"chat_template": "\ud83d"}', "is no JSON"),
    "no list": (b'{"end_tokens": "</s>"}', "list of tokens"),
    "ids": (b'{"end_tokens": [2]}', "list of tokens"),
    "many": (json.dumps({"end_tokens": ["a"] * 17}).encode(), "at most 16"),
    "a token that was added": (b'{"end_tokens": ["<|im_end|>"]}', "'<|im_end|>' is no token"),
    "no Jinja": (b'{"chat_template": "a\\n{% if %}"}', "line 2 is no Jinja"),
    "a tag that nobody knows": (b'{"chat_template": "{% import os %}"}', "line 1 is no Jinja"),
    "deep": (json.dumps({"chat_template": "{{" + "(" * 9_000 + "}}"}).encode(), "Jinja|deeply"),
    "long": (json.dumps({"chat_template": "{{a}}" * 50_000}).encode(), "more than 20,000 words"),
    "a long number": (
        json.dumps({"chat_template": "{{ " + "9" * 5000 + " }}"}).encode(),
        "thousands of digits",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_cannot_be_served_is_refused_by_name(store: AdapterStore, name: str) -> None:
    data, said = BAD[name]
    with pytest.raises(InvalidAdapter, match=said) as refused:
        await upload(store, data)
    assert refused.value.message.startswith("chat.json: ")


async def test_too_large_settings_are_refused_before_they_come(store: AdapterStore) -> None:
    with pytest.raises(InvalidAdapter, match=r"chat\.json: .* more than the 262144"):
        await upload(store, b" " * (MAX_CHAT_BYTES + 1))


@pytest.mark.parametrize("template", ["", GENERATION, "{{ 10 ** 10 ** 10 ** 10 }}", "{% break %}"])
def test_a_template_is_parsed_and_not_run(template: str, tmp_path: Path, model: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"chat_template": template}))
    check_chat(file, model)
