"""An adapter that another trainer wrote, from its folder to a router, as a user types it."""

import json
from pathlib import Path

import torch
from command_line import granatum
from router_box import Box
from safetensors.torch import load
from wire_adapters import adapter_files

NAME = "unsloth/llama-3-8b-bnb-4bit"


async def test_a_pickle_for_another_base(box: Box, tmp_path: Path) -> None:
    router = await box.router(**{"model-name": "Llama-3.1-8B"})
    env = {"GRANATUM_ADDRESS": f"127.0.0.1:{router.port}", "GRANATUM_KEY": box.acme}
    files, source, out = adapter_files(), tmp_path / "source", tmp_path / "out"
    source.mkdir()
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": NAME}
    (source / "adapter_config.json").write_text(json.dumps(config))
    torch.save(load(files["adapter_model.safetensors"]), source / "adapter_model.bin")

    status, _, errors = await granatum("adapters", "upload", "style", str(source), **env)
    assert status == 1
    assert f"granatum adapters convert {source} OUT" in errors
    status, output, errors = await granatum("adapters", "convert", str(source), str(out))
    assert (status, errors) == (0, "")
    assert output == f"{out} is a PEFT adapter: granatum adapters upload NAME {out}\n"

    status, _, errors = await granatum("adapters", "upload", "style", str(out), **env)
    assert status == 1
    assert f"is '{NAME}', but 'Llama-3.1-8B' is served here (another version)" in errors
    told = ("--for-base", NAME)
    status, output, _ = await granatum("adapters", "upload", "style", str(out), *told, **env)
    assert (status, output.split()[:2]) == (0, ["uploaded", "acme/style@1"])
    _, output, _ = await granatum("adapters", "list", **env)
    assert output.splitlines()[1].endswith(NAME)
