"""Which modules are adapted, with which rank and scale: PEFT itself is the oracle."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from granatum.adapters_store.format.modules import ModuleSpec
from granatum.adapters_store.format.peft_config import PeftConfig
from granatum.models.base_model import BaseModel
from granatum.models.families import FAMILIES, LLAMA
from granatum.v1.errors import InvalidAdapter, InvalidRequest

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": None,
    "sliding_window": None,
}


def _model(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **SHAPE)
        )
    return model


def _base(tmp_path: Path, family: str) -> BaseModel:
    AutoConfig.for_model(family, **SHAPE).save_pretrained(tmp_path)
    return BaseModel.from_config(tmp_path)


def _of_peft(config: LoraConfig, family: str) -> dict[str, ModuleSpec]:
    model = get_peft_model(_model(family), config)
    return {
        name.removeprefix("base_model.model."): ModuleSpec(
            module.r["default"], module.scaling["default"]
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _of_ours(data: bytes, base: BaseModel) -> dict[str, ModuleSpec]:
    modules = PeftConfig.parse(data).modules(base)
    return {base.module_name(*place): spec for place, spec in modules.items()}


def _json(config: LoraConfig) -> bytes:
    fields = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.dumps(fields).encode()


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "defaults": {"target_modules": ["q_proj"]},
    "no targets": {"r": 2},
    "all projections": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": list(LLAMA.projections),
    },
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear", "exclude_modules": ["down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": ["o_proj"]},
    "rank_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"q_proj": 16, "model.layers.1.self_attn.k_proj": 2, r".*\.1.\..*": 3},
        "alpha_pattern": {r"layers\.[0-5]\.mlp\.up_proj": 32, "k_proj": 1},
    },
    "pattern order": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.*q_proj": 3, "q_proj": 5, "self_attn.(v|k)_proj": 7, "proj": 9},
    },
    "pattern anchors": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"^q_proj": 3, "^model.layers.0.*": 5, "q_proj$": 6, "_proj": 7},
    },
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"mlp.*": 9},
        "alpha_pattern": {"down_proj": 2.5},
    },
    "regex": {"target_modules": r".*\.layers\.(0|11)\.self_attn\.[qk]_proj"},
    "regex of one layer": {"target_modules": r"model\.layers\.1\.mlp\.(?!down).*_proj"},
    "whole names": {"target_modules": ["model.layers.3.mlp.up_proj", "layers.1.mlp.gate_proj"]},
    "unmatched entry": {"target_modules": ["q_proj", "c_attn"]},
    "layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 3, 11]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers_pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers_patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h", "model.layers"],
    },
    "whole name beside layers": {
        "target_modules": ["model.layers.3.mlp.up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
    "exclude": {
        "target_modules": "all-linear",
        "exclude_modules": ["v_proj", "layers.1.mlp.up_proj"],
    },
    "exclude regex": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": r"model\.layers\.(0|2)\..*",
    },
    "exclude lm_head": {"target_modules": r".*(_proj|lm_head)", "exclude_modules": ["lm_head"]},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_modules_as_peft(case: str, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **CONFIGS[case])
    written = _json(config)
    base = _base(tmp_path, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _of_peft(config, "llama")
    assert _of_ours(written, base) == expected
    assert _of_ours(_json(config), base) == expected  # as PEFT rewrites it while injecting


FUSED: dict[str, dict[str, Any]] = {
    "one of each": {"r": 4, "lora_alpha": 12, "target_modules": ["qkv_proj", "o_proj"]},
    "all-linear but one": {"target_modules": "all-linear", "exclude_modules": ["gate_up_proj"]},
    "regex": {"target_modules": r".*\.(1|2)\.(self_attn\.qkv|mlp\.gate_up)_proj"},
    "patterns": {
        "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"],
        "rank_pattern": {"qkv_proj": 16, "layers.3.mlp.gate_up_proj": 2},
        "alpha_pattern": {r".*up_proj": 5},
    },
    "layers": {"target_modules": ["qkv_proj", "up_proj"], "layers_to_transform": [0, 11]},
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_modules_are_those_of_peft(case: str, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **FUSED[case])
    written = _json(config)
    assert _of_ours(written, _base(tmp_path, "phi3")) == _of_peft(config, "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_targets_are_those_that_peft_knows(family: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2)
    written, base = _json(config), _base(tmp_path, family)
    if FAMILIES[family].default_targets:
        assert _of_ours(written, base) == _of_peft(config, family)
        return
    with pytest.raises(ValueError, match="target_modules"):
        _of_peft(config, family)
    with pytest.raises(InvalidAdapter, match=rf"target_modules is null.*{family}.*o_proj"):
        _of_ours(written, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", rank_pattern={"layers.2..*": 5})
    written = _json(config)
    assert _of_ours(written, _base(tmp_path, family)) == _of_peft(config, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    base = _base(tmp_path, family)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in _model(family).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert base.num_layers == SHAPE["num_hidden_layers"]
    assert linears == {
        base.module_name(layer, module): base.module_features(module)
        for layer in range(base.num_layers)
        for module in base.modules
    }


def test_fingerprint_follows_the_shape(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    first = BaseModel.from_config(tmp_path)

    def fingerprint(**changes: object) -> str:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({**config, **changes}))
        return BaseModel.from_config(path).fingerprint

    older = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
    assert fingerprint(**older, torch_dtype="float16") == first.fingerprint
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0}
    assert fingerprint(rope_parameters={**llama3, "rope_theta": 5e5}) == fingerprint(
        rope_parameters=None, rope_theta=500000, rope_scaling={**llama3, "factor": 8}
    )
    assert fingerprint(rms_norm_eps=1e-3) != first.fingerprint
    assert fingerprint(**{**older, "rope_theta": 5e5}) != first.fingerprint
    assert first.name == tmp_path.name
    assert BaseModel.from_config(tmp_path / "config.json", name="tiny").name == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "published with the model"),
        ("[]", "object"),
        ('{"model_type": "gpt2"}', "one of llama"),
        ('{"model_type": "llama"}', "num_attention_heads"),
    ],
)
def test_bad_base_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        BaseModel.from_config(tmp_path)


GOOD = json.loads(_json(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
REFUSED: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "IA3"},
    "task_type": {"task_type": "SEQ_CLS"},
    "task_type ": {"task_type": ["CAUSAL_LM"]},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "megatron_config": {"megatron_config": {"a": 1}},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "target_parameters": {"target_parameters": ["x"]},
    "use_qalora": {"use_qalora": True},
    "use_bdlora": {"use_bdlora": {"nblocks": 1}},
    "arrow_config": {"arrow_config": {"top_k": 1}},
    "kasa_config": {"kasa_config": {}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "use_bdlora ": {"use_bdlora": {}},
    "option_of_tomorrow": {"option_of_tomorrow": 1},
    "init_lora_weights is .*pissa_niter_4.*path_initial_model": {
        "init_lora_weights": "pissa_niter_4"
    },
    "init_lora_weights is .*olora": {"init_lora_weights": "olora"},
    "init_lora_weights is .*CorDA": {"init_lora_weights": "CorDA"},
    "init_lora_weights is .*loftq": {"init_lora_weights": "loftq"},
    "r must be a whole number": {"r": 0},
    r"r must be a whole number ": {"r": True},
    r"r must be a whole number  ?": {"r": 4.0},
    "lora_alpha must be a number": {"lora_alpha": "16"},
    "lora_alpha must be a finite": {"lora_alpha": float("nan")},
    "lora_alpha must be a finite ": {"lora_alpha": 10**400},
    "lora_alpha must be a finite  ?": {"lora_alpha": -1e31},
    "use_rslora must be true or false": {"use_rslora": 1},
    "rank_pattern must be an object": {"rank_pattern": ["q_proj"]},
    r"rank_pattern\['q_proj'\] must be": {"rank_pattern": {"q_proj": -1}},
    r"alpha_pattern: the pattern '\(' is no regular": {"alpha_pattern": {"(": 1}},
    "target_modules must be a list": {"target_modules": [1]},
    "target_modules: the pattern .* is no regular": {"target_modules": "*"},
    "target_modules matches no module": {"target_modules": ["c_attn"]},
    "target_modules matches no module ": {"target_modules": "q_proj"},
    "target_modules matches no module  ?": {"target_modules": []},
    "matches lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "matches model.embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "matches model, ": {"target_modules": ".*"},
    "layers_to_transform cannot": {"target_modules": "all-linear", "layers_to_transform": [0]},
    "layers_to_transform must": {"layers_to_transform": ["0"]},
    "layers_pattern is given without": {"layers_pattern": "layers"},
    "layers_pattern must": {"layers_to_transform": [0], "layers_pattern": "layers|h"},
    "exclude_modules must": {"exclude_modules": {"q_proj": 1}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message: str, tmp_path: Path) -> None:
    data = json.dumps({**GOOD, **REFUSED[message]}).encode()
    with pytest.raises(InvalidAdapter, match=f"adapter_config.json: .*{message.rstrip()}"):
        PeftConfig.parse(data).modules(_base(tmp_path, "llama"))


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"\x80\x02}q."])
def test_no_config_at_all(data: bytes) -> None:
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json: .*save_pretrained"):
        PeftConfig.parse(data)


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(value: object) -> None:
    PeftConfig.parse(json.dumps({**GOOD, "init_lora_weights": value, "lora_dropout": 0.1}).encode())


def _large(tmp_path: Path) -> BaseModel:
    AutoConfig.for_model("llama", **{**SHAPE, "num_hidden_layers": 80}).save_pretrained(tmp_path)
    return BaseModel.from_config(tmp_path)


def test_a_pattern_for_every_module_of_a_large_model(tmp_path: Path) -> None:
    base = _large(tmp_path)
    patterns = {
        base.module_name(layer, projection): layer + 1
        for layer in range(80)
        for projection in base.modules
    }
    fields = {**GOOD, "target_modules": "all-linear", "rank_pattern": patterns}
    modules = PeftConfig.parse(json.dumps(fields).encode()).modules(base)
    assert all(spec.rank == layer + 1 for (layer, _), spec in modules.items())


def test_a_long_pattern_on_a_large_model(tmp_path: Path) -> None:
    target = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
    )
    fields = {**GOOD, "target_modules": target}
    modules = PeftConfig.parse(json.dumps(fields).encode()).modules(_large(tmp_path))
    assert len(modules) == 80 * 7


def test_hostile_patterns_are_refused(tmp_path: Path) -> None:
    fields = {**GOOD, "rank_pattern": {f"{'.*' * 20}x{i}": 1 for i in range(200)}}
    with pytest.raises(InvalidAdapter, match=r"rank_pattern: the pattern .* takes too long"):
        PeftConfig.parse(json.dumps(fields).encode()).modules(_large(tmp_path))
