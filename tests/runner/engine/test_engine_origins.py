"""Adapters as trainers really leave them: the engine's answers are those of the trained model."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import (
    CordaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, TinyEngine, make_model, reference_logits
from transformers import LlamaForCausalLM

from granatum.cli.convert import convert_adapter
from granatum.runner.records import Submit

BATCH = torch.arange(24).reshape(2, 12) % VOCAB
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model(folder, "llama_mha")
    return folder


def tuned(base: Path, prepare: Callable[[Any, Any], None] | None = None, **options: Any) -> Any:
    """A PEFT model of the base, before its training."""
    torch.manual_seed(2)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{**fields, **options})
    if prepare is not None:
        prepare(model, config)
    return get_peft_model(model, config)


def train(model: PeftModel) -> None:
    """Steps of gradient descent that leave every matrix another one, and an evaluated model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def assert_served(base: Path, reference: Any, folder: Path) -> None:
    """The engine's tokens are the likeliest of the reference, and its log probabilities agree."""
    engine = TinyEngine(base, folder.parent, [folder.name])
    prompt = tuple(range(3, 20))
    submit = Submit(1, prompt, adapter=folder.name, max_tokens=6, top_logprobs=4)
    told = engine.run(submit)[1]
    engine.close()
    logits = reference_logits(reference, None, [*prompt, *told.tokens])[len(prompt) - 1 : -1]
    assert told.tokens == logits.argmax(-1).tolist()
    expected = torch.log_softmax(logits, -1)
    for row, entry in zip(expected, told.logprobs, strict=True):
        for token, value in entry.top:
            assert value == pytest.approx(float(row[token]), abs=1e-3)


def plain_logits(base: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return reference_logits(model, None, list(range(3, 20)))


def of_loraga(model: Any, config: Any) -> None:
    preprocess_loraga(model, config, lambda: model(BATCH, labels=BATCH).loss.backward())


def of_corda(model: Any, config: Any) -> None:
    preprocess_corda(model, config, run_model=lambda: model(BATCH[:1]))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("kind", "prepare", "options"),
    [
        ("pissa", None, {}),
        ("olora", None, {}),
        ("corda", of_corda, {"corda_config": CordaConfig(corda_method="kpm")}),
        ("lora_ga", of_loraga, {"lora_ga_config": LoraGAConfig()}),
    ],
)
def test_what_changed_the_base_and_was_converted(
    kind: str, prepare: Any, options: dict[str, Any], rslora: bool, base: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tuned(base, prepare, init_lora_weights=kind, use_rslora=rslora, **options)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "untrained")
        model.peft_config["default"].init_lora_weights = kind
        train(model)
        reference = logits_of(model)
        assert not torch.allclose(reference, plain_logits(base), atol=1e-2)
        model.save_pretrained(
            tmp_path / "adapter",
            path_initial_model_for_weight_conversion=str(tmp_path / "untrained"),
        )
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (fields["r"], fields["init_lora_weights"]) == (8, True)
    assert all(fields[name] for name in options)
    assert_served(base, model.base_model, tmp_path / "adapter")


def logits_of(model: Any) -> torch.Tensor:
    return reference_logits(model.base_model, None, list(range(3, 20)))


@pytest.mark.parametrize(
    "options",
    [
        {"velora_config": VeloraConfig(num_groups=4)},
        {"monteclora_config": MontecloraConfig()},
        {"fan_in_fan_out": True},
        {"ensure_weight_tying": True},
        {"lora_dropout": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_the_training_alone(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tuned(base, **options)
        train(model)
        model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "fan_in_fan_out": "fan_in_fan_out" in options}))
    assert_served(base, model.base_model, tmp_path / "adapter")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trained PEFT model, and the folder that save_pretrained wrote."""
    model = tuned(base, rank_pattern={"up_proj": 7})
    train(model)
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    model.save_pretrained(folder)
    return model.base_model, folder


@pytest.mark.parametrize(
    "renamed",
    [
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: n.removeprefix("base_model.model.model."),
        lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module.{n}",
        lambda n: n.replace("model.layers", "language_model.layers"),
        lambda n: n.replace("model.model.layers", "model.language_model.model.layers"),
        lambda n: n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda n: f"_fsdp_wrapped_module.{n}".replace(".weight", ".sales.weight"),
    ],
)
def test_names_that_can_only_mean_one_thing(
    renamed: Callable[[str], str], base: Path, plain: tuple[Any, Path], tmp_path: Path
) -> None:
    reference, folder = plain
    shutil.copytree(folder, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file({renamed(name): t for name, t in load_file(weights).items()}, weights)
    assert load_file(weights).keys() != load_file(folder / weights.name).keys()
    assert_served(base, reference, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pickle_that_was_converted(
    dtype: torch.dtype, plain: tuple[Any, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain[1], source)
    tensors = {n: t.to(dtype) for n, t in load_file(source / "adapter_model.safetensors").items()}
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    convert_adapter(source, tmp_path / "out")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    config = "adapter_config.json"
    assert (tmp_path / "out" / config).read_bytes() == (source / config).read_bytes()


class Mlx(torch.nn.Module):
    """MLX's linear with LoRA, by its formula: y + scale * (x A) B."""

    def __init__(self, linear: torch.nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_a = torch.randn(linear.in_features, rank) * 0.1
        self.lora_b = torch.randn(rank, linear.out_features) * 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y + self.scale * ((x @ self.lora_a) @ self.lora_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mlx_that_was_converted(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors: Tensors = {}
    for path, rank in (("self_attn.q_proj", 8), ("self_attn.v_proj", 8), ("mlp.down_proj", 5)):
        parent, _, child = f"model.layers.1.{path}".rpartition(".")
        holder = model.get_submodule(parent)
        module = Mlx(getattr(holder, child), rank, 2.5)
        for name in ("lora_a", "lora_b"):
            rounded = getattr(module, name).to(dtype)
            tensors[f"{parent}.{child}.{name}"] = rounded.contiguous()
            setattr(module, name, rounded.float())
        setattr(holder, child, module)
    source = tmp_path / "mlx"
    source.mkdir()
    save_file(tensors, source / "adapters.safetensors")
    settings = {"rank": 8, "scale": 2.5, "dropout": 0.0}
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    config = {**fields, "model": "mlx-community/Llama-3.1-8B-4bit"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "adapter"
    convert_adapter(source, out)
    assert_served(base, model, out)
    peft = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), out
    )
    torch.testing.assert_close(
        logits_of(peft), reference_logits(model, None, list(range(3, 20))), atol=1e-4, rtol=1e-4
    )
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "mlx-community/Llama-3.1-8B-4bit"
