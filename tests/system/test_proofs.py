"""Proofs over real processes: what transformers and PEFT compute in float32 is the oracle."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import Cluster
from command_line import granatum
from safetensors.torch import load_file, save_file

from granatum.client.client import Client
from granatum.examples import accuracy
from granatum.examples.tasks import ADAPTER_TASKS, REAL_WORDS, Task
from granatum.examples.write_proof import proof
from granatum.v1.errors import InvalidRequest, NotFound

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

TASKS = {task.name: task for task in ADAPTER_TASKS}
CHANT, SORT = TASKS["chant"], TASKS["sort"]
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def ids_of(tokenizer: Any, task: Task) -> list[tuple[str, list[int]]]:
    """Four prompts with their answers."""
    texts = [task.prompt(word) + task.expected(word) + task.stop for word in REAL_WORDS[:4]]
    return [(text, tokenizer(text).input_ids) for text in texts]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Task], Path]:
    """The proof file of an adapter, by transformers and PEFT."""
    model, tokenizer = accuracy.load_adapters(accuracy.load_base()), accuracy.load_tokenizer()
    folder = tmp_path_factory.mktemp("proofs")

    def of(task: Task) -> Path:
        model.set_adapter(task.name)
        path = folder / f"{task.name}.json"
        path.write_text(json.dumps(proof(model, ids_of(tokenizer, task))))
        return path

    return of


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
    key, admin = cluster.tenant_key("acme"), cluster.admin_key()
    cluster.start_router()
    cluster.start_runner()
    await cluster.runners_alive(admin, 1)
    async with cluster.client(key) as connected:
        yield connected


def _doubled_alpha(config: dict[str, Any], _: Tensors) -> None:
    config["lora_alpha"] *= 2


def _halved_alpha(config: dict[str, Any], _: Tensors) -> None:
    config["lora_alpha"] /= 2


def _plain_scaling(config: dict[str, Any], _: Tensors) -> None:
    config["use_rslora"] = False


def _layer_lost(_: dict[str, Any], tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if ".layers.2." in name and "lora_B" in name:
            tensor.zero_()


def _layers_swapped(_: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".layers.1.", ".layers.3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _transposed(_: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if "q_proj" in name and "lora_A" in name]:
        b = name.replace("lora_A", "lora_B")
        tensors[name], tensors[b] = tensors[b].T.contiguous(), tensors[name].T.contiguous()


def _ignored(_: dict[str, Any], tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


WRONG = (
    _doubled_alpha,
    _halved_alpha,
    _plain_scaling,
    _layer_lost,
    _layers_swapped,
    _transposed,
    _ignored,
)


def spoilt(task: Task, spoil: Callable[[dict[str, Any], Tensors], None], folder: Path) -> Path:
    """A valid adapter that is not the trained one."""
    folder.mkdir()
    config = json.loads((task.path / "adapter_config.json").read_text())
    tensors = load_file(task.path / WEIGHTS)
    spoil(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


async def test_the_trained_adapter_is_proven_and_others_never_become_visible(
    client: Client, proofs: Callable[[Task], Path], tmp_path: Path
) -> None:
    file = proofs(CHANT)
    for spoil in WRONG:
        folder = spoilt(CHANT, spoil, tmp_path / spoil.__name__)
        with pytest.raises(InvalidRequest) as refused:
            await client.upload("chant", folder, proof=file)
        assert refused.value.reason == "PROOF_FAILED", spoil
        assert "is off by" in refused.value.message, spoil
        with pytest.raises(NotFound):
            await client.get("chant")
    assert not await client.list_adapters()
    adapter = (await client.upload("chant", CHANT.path, proof=file)).adapter
    assert adapter.version == 1
    assert adapter.proof is not None
    assert adapter.proof.mean < 1e-4
    assert adapter.proof.base_mean < 1e-4
    assert adapter.proof.effect > 0.5
    assert adapter.proof.tokens == sum(
        len(prompt["logprobs"]) for prompt in json.loads(file.read_text())["prompts"]
    )
    assert (await client.get("chant")).proof == adapter.proof
    assert (await client.list_adapters())[0].proof == adapter.proof


async def test_verify_says_later_what_an_upload_would_have_said(
    client: Client, cluster: Cluster, proofs: Callable[[Task], Path]
) -> None:
    key = cluster.tenant_key("acme")
    for task in (CHANT, SORT):
        file = proofs(task)
        assert (await client.upload(task.name, task.path)).adapter.proof is None
        right = await client.verify(task.name, file)
        assert right.passed
        assert right.result.mean < 1e-4
        assert (await client.get(task.name)).proof is None
    wrong = await client.verify("chant", proofs(SORT))
    assert not wrong.passed
    assert wrong.result.mean > wrong.result.bound
    env = {"GRANATUM_ADDRESS": cluster.addresses["router-0"], "GRANATUM_KEY": key}
    for name, code, word in (("sort", 0, "proven: off by"), ("chant", 1, "not proven: off by")):
        command = ("adapters", "verify", name, "--against", str(proofs(SORT)))
        status, output, errors = await granatum(*command, **env)
        assert (status, bool(errors)) == (code, bool(code))
        assert output.startswith(word)
    again = await client.upload("sort", SORT.path, proof=proofs(SORT))
    assert not again.created
    assert again.adapter.version == 1
    assert again.adapter.proof is not None
    assert (await client.get("sort")).proof == again.adapter.proof


async def test_a_proof_of_another_base_model_or_of_no_effect_proves_nothing(
    client: Client, proofs: Callable[[Task], Path], tmp_path: Path
) -> None:
    right = json.loads(proofs(SORT).read_text())
    base = accuracy.load_base()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    other = accuracy.load_adapters(base)
    other.set_adapter("sort")
    elsewhere = proof(other, [(p["text"], p["token_ids"]) for p in right["prompts"]])
    with pytest.raises(InvalidRequest, match="another base model"):
        await client.upload("sort", SORT.path, proof=written(tmp_path, elsewhere))
    for prompt in right["prompts"]:
        prompt["logprobs"] = prompt["base_logprobs"]
    folder = spoilt(SORT, _ignored, tmp_path / "ignored")
    with pytest.raises(InvalidRequest, match="cannot tell it from the base model"):
        await client.upload("sort", folder, proof=written(tmp_path, right))
    right["prompts"][3]["token_ids"][2] = 259
    with pytest.raises(InvalidRequest, match=r"prompts\[3\].*259") as refused:
        await client.upload("sort", SORT.path, proof=written(tmp_path, right))
    assert refused.value.field == "proof.prompts[3].token_ids"
    assert not await client.list_adapters()


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "proof.json"
    path.write_text(json.dumps(content))
    return path
