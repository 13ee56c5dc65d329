"""Which names of base models are taken for one model, and which for two."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_files import config, tensors, upload, weights
from transformers import LlamaConfig
from uploading import BASE, SHAPE, chunks_of, header_of

from granatum.adapters_store.catalog.catalog import Catalog, Version, Visibility
from granatum.adapters_store.catalog.catalog_json import decode, encode
from granatum.adapters_store.catalog.manifest import Manifest
from granatum.adapters_store.format.trained_for import check_trained_for
from granatum.adapters_store.limits import DEFAULT_LIMITS
from granatum.adapters_store.store import AdapterStore
from granatum.models.base_model import BaseModel
from granatum.v1.errors import InvalidAdapter

SAME = {
    "Llama-3.1-8B": [
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Meta-Llama-3.1-8B",
        "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "unsloth/llama-3.1-8b-unsloth-bnb-4bit",
        "mlx-community/Meta-Llama-3.1-8B-4bit",
        "/data/models/llama-3_1-8b",
        "C:\\models\\llama3.1-8b-GPTQ-int4",
        "meta-llama-3-1-8b",
        "LLM-Research/Meta-Llama-3___1-8B",
        "llama3",
        "./code",
        "./my-math-model",
        "./orca-output",
        "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a1",
        "meta-llama/Llama-3.1-8B@0e9e39f",
        "./llama31-8b-w4a16",
        "llama-8b",
        "./output",
        "./output/checkpoint-500",
        "our-model",
        "",
    ],
    "llama-2-7b-hf": ["meta-llama/Llama-2-7b-hf", "TheBloke/Llama-2-7B-GGML", "Llama-2-7b-8-bit"],
    "Meta-Llama-3-8B-Instruct": [
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "unsloth/llama-3-8b-Instruct-bnb-4bit",
        "/root/autodl-tmp/LLM-Research/Meta-Llama-3-8B-Instruct",
    ],
    "Mistral-7B-Instruct-v0.2": [
        "unsloth/mistral-7b-instruct-v0.2-bnb-4bit",
        "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ",
    ],
    "Qwen2.5-7B-Instruct": ["unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "qwen2_5-7b-instruct-awq"],
    "Qwen3-8B": ["Qwen/Qwen3-8B", "unsloth/Qwen3-8B-unsloth-bnb-4bit", "Qwen/Qwen3-8B-FP8"],
    "SmolLM2-135M": ["HuggingFaceTB/SmolLM2-135M"],
    "Phi-3.5-mini-instruct": ["unsloth/Phi-3.5-mini-instruct-bnb-4bit", "phi-3.5-mini"],
    "Llama-3.1-8B-Instruct": ["llama3.1-8b-it", "llama-8b", "llama3.1", "chat"],
    "llama3": ["meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"],
    "qwen2.5": ["Qwen/Qwen2.5-7B-Instruct"],
    "mistral-7b": ["mistralai/Mistral-7B-Instruct-v0.2"],
    "code": ["meta-llama/Llama-3.1-8B-Instruct"],
    "math-tutor": ["Qwen/Qwen2.5-7B-Instruct"],
    "CodeLlama-7b-hf": ["code-llama-7b", "unsloth/codellama-7b-bnb-4bit"],
    "DeepSeek-R1-Distill-Qwen-7B": ["/models/deepseek-r1-qwen-7b", "R1-Distill-Qwen-7B"],
    "Phi-3-mini-4k-instruct": ["phi-3-mini-instruct", "phi3"],
    "vicuna-7b-v1.5": ["lmsys/vicuna-7b-v1.5"],
    "hermes-3": ["NousResearch/Hermes-3-Llama-3.1-8B"],
    "prod": ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B-Instruct"],
    "base": ["base", "mistralai/Mistral-7B-v0.1"],
}
OTHER = {
    "Llama-3.1-8B": [
        "meta-llama/Meta-Llama-3-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "unsloth/llama-3-8b-bnb-4bit",
        "NousResearch/Hermes-3-Llama-3.1-8B",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "mistralai/Mistral-7B-v0.1",
    ],
    "Meta-Llama-3-8B-Instruct": ["meta-llama/Meta-Llama-3-8B", "meta-llama-3-1-8b-instruct"],
    "Mistral-7B-v0.1": ["mistralai/Mistral-7B-v0.2", "Mistral-7B-Instruct-v0.1", "zephyr-7b-beta"],
    "Llama-2-7b-hf": ["meta-llama/Llama-2-7b-chat-hf", "lmsys/vicuna-7b-v1.5", "CodeLlama-7b-hf"],
    "Qwen2.5-7B": ["Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-Coder-7B", "Qwen/Qwen2-7B"],
    "Qwen2.5-7B-Instruct": ["Qwen/Qwen2.5-7B-Instruct-1M", "qwen/Qwen2___5-Math-7B-Instruct"],
    "Qwen3-8B": ["Qwen/Qwen3-8B-Base", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B"],
    "Phi-3-mini-4k-instruct": ["microsoft/Phi-3-mini-128k-instruct"],
    "CodeLlama-7b-hf": ["codellama/CodeLlama-7b-Python-hf"],
    "Mistral-7B-Instruct-v0.2": ["unsloth/mistral-7b-instruct-v0.3-bnb-4bit"],
    "Mistral-Nemo-Instruct-2407": ["mistralai/Mistral-Nemo-Base-2407"],
    "Qwen3-4B-Instruct-2507": ["Qwen/Qwen3-4B-Thinking-2507"],
}


@pytest.mark.parametrize(("served", "name"), [(s, n) for s, names in SAME.items() for n in names])
def test_names_of_one_model(served: str, name: str) -> None:
    check_trained_for(name, replace(BASE, name=served), "")
    check_trained_for(name, replace(BASE, name=f"{served}-bnb-4bit".lower()), "")


@pytest.mark.parametrize(("served", "name"), [(s, n) for s, names in OTHER.items() for n in names])
def test_names_of_two_models(served: str, name: str) -> None:
    base = replace(BASE, name=served)
    with pytest.raises(InvalidAdapter) as error:
        check_trained_for(name, base, "")
    assert f"is '{name}', but '{served}' is served" in error.value.message
    assert f"--for-base '{name}'" in error.value.message
    assert error.value.field == "adapter_config.json"
    check_trained_for(name, base, name)
    with pytest.raises(InvalidAdapter, match=r"header.base_model is 'another', .* says"):
        check_trained_for(name, base, "another")


def test_the_origin_speaks_where_the_folder_does_not() -> None:
    base = replace(BASE, name="model", origin="meta-llama/Meta-Llama-3-8B")
    check_trained_for("unsloth/llama-3-8b-bnb-4bit", base, "")
    with pytest.raises(InvalidAdapter, match="another version"):
        check_trained_for("meta-llama/Llama-3.1-8B", base, "")
    check_trained_for("meta-llama/Llama-3.1-8B", replace(base, name="Llama-3.1-8B"), "")


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", "HuggingFaceH4/zephyr-7b-beta"),
        ("meta-llama/Meta-Llama-3.1-8B", "NousResearch/Hermes-3-Llama-3.1-8B"),
        ("meta-llama/Llama-2-7b-hf", "lmsys/vicuna-7b-v1.5"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_the_origin_may_be_what_the_model_was_trained_from(origin: str, name: str) -> None:
    check_trained_for(name, replace(BASE, name="model", origin=origin), "")


def test_names_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0e9e39f"
    LlamaConfig(num_hidden_layers=1).save_pretrained(folder)
    assert BaseModel.from_config(folder).names == ("Llama-3.1-8B", "")
    fields = json.loads((folder / "config.json").read_text())
    for origin, known in (("a/b", "a/b"), (None, ""), (7, "")):
        (folder / "config.json").write_text(json.dumps({**fields, "_name_or_path": origin}))
        assert BaseModel.from_config(folder, "mine").names == ("mine", known)


async def sent(store: AdapterStore, asked_for: str = "", **fields: Any) -> Manifest:
    made = upload(config(**fields), weights(tensors(SHAPE)))
    header = replace(header_of(made), base_model=asked_for)
    manifest, _ = await store.upload("acme", header, chunks_of(made))
    return manifest


@pytest.mark.parametrize(
    ("name", "revision", "known"),
    [
        ("meta-llama/Llama-3.1-8B", None, "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "main", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "v1", "meta-llama/Llama-3.1-8B@v1"),
        (None, "v1", ""),
        ("/模型/" + "x" * 300, None, "x" * 256),
    ],
)
async def test_the_name_is_stored(name: object, revision: object, known: str) -> None:
    store = AdapterStore.open("memory://", BASE)
    manifest = await sent(store, base_model_name_or_path=name, revision=revision)
    assert manifest.base_model == known
    assert (await store.get("acme", "adapter")).base_model == known
    assert (await store.list("acme")).adapters[0].base_model == known


async def test_another_base_is_taken_if_the_tenant_says_so(tmp_path: Path) -> None:
    store = AdapterStore.open(str(tmp_path), replace(BASE, name="Llama-3.1-8B"))
    name = "meta-llama/Meta-Llama-3-8B"
    with pytest.raises(InvalidAdapter, match="another version"):
        await sent(store, base_model_name_or_path=name)
    assert (await store.list("acme")).adapters == ()
    assert (await sent(store, name, base_model_name_or_path=name)).base_model == name


async def test_strangers_do_not_see_folders() -> None:
    store = AdapterStore.open("memory://", BASE)
    await sent(store, base_model_name_or_path="/home/ann/secret/llama-3-8b")
    await store.set_visibility("acme", "adapter", Visibility.PUBLISHED)
    assert (await store.get("umbrella", "acme/adapter")).base_model == "llama-3-8b"
    assert (await store.get("acme", "adapter")).base_model == "/home/ann/secret/llama-3-8b"


@pytest.mark.parametrize("name", ["x\ud800", "a\nb", ["a"], 7])
async def test_odd_names_are_refused(name: object) -> None:
    with pytest.raises(InvalidAdapter, match="base_model_name_or_path must be a text"):
        await sent(AdapterStore.open("memory://", BASE), base_model_name_or_path=name)


def test_a_catalog_without_names_is_read() -> None:
    """As the code before names wrote it; that code reads what we write, too."""
    named = Version(0, "a" * 64, 10, 8, ("q_proj",), 1.0, BASE.fingerprint, 640, "llama-3-8b")
    unnamed = replace(named, digest="b" * 64, base_model="")
    catalog = Catalog().add_version("a", named, DEFAULT_LIMITS)
    catalog = catalog.add_version("b", unnamed, DEFAULT_LIMITS)
    assert decode(encode(catalog, "r"))[0] == catalog
    fields = json.loads(encode(catalog, "r"))
    assert [len(kind) for kind in fields["kinds"]] == [2, 2]
    assert fields.pop("base_models") == ["llama-3-8b", ""]
    del fields["sha256"]
    old = json.dumps(fields, separators=(",", ":"))[:-1]
    digest = hashlib.sha256(old.encode()).hexdigest()
    found, _ = decode(f'{old},"sha256":"{digest}"}}'.encode())
    assert [found.newest(name) for name in ("a", "b")] == [
        replace(version, version=1, base_model="") for version in (named, unnamed)
    ]
