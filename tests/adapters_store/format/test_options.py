"""Options of adapter_config.json: each that PEFT has is used, without effect, or refused."""

import dataclasses
import json
from typing import Any

import pytest
from adapter_files import config
from peft import LoraConfig

from granatum.adapters_store.format.peft_config import PeftConfig
from granatum.adapters_store.format.peft_options import REASONS, USED, WITHOUT_EFFECT
from granatum.v1.errors import InvalidAdapter


def changed(name: str, value: object) -> bytes:
    fields: dict[str, Any] = {name: value}
    return config(**fields)


def test_every_option_of_peft_has_a_verdict() -> None:
    verdicts = [USED, WITHOUT_EFFECT, REASONS.keys()]
    for field in dataclasses.fields(LoraConfig):
        assert sum(field.name in verdict for verdict in verdicts) == 1, field.name


def test_what_peft_writes_by_default_is_taken() -> None:
    fields = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    data = json.dumps({**fields, "target_modules": ["q_proj"]}).encode()
    assert PeftConfig.parse(data).rank == LoraConfig().r


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
@pytest.mark.parametrize("name", ["option_of_tomorrow", "use_dora", "megatron_config"])
def test_empty_values_ask_for_nothing(name: str, value: object) -> None:
    PeftConfig.parse(changed(name, value))


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", [0], {"a": 0}, float("nan")])
def test_other_values_of_unknown_options_are_refused(value: object) -> None:
    with pytest.raises(InvalidAdapter, match=r"option_of_tomorrow is .* not supported"):
        PeftConfig.parse(config(option_of_tomorrow=value))


@pytest.mark.parametrize("name", ["arrow_config", "kasa_config", "use_bdlora"])
def test_options_that_peft_reads_from_an_empty_object(name: str) -> None:
    PeftConfig.parse(changed(name, None))
    with pytest.raises(InvalidAdapter, match=f"{name} is '{{}}'"):
        PeftConfig.parse(changed(name, {}))


LEFTOVERS: list[dict[str, Any]] = [
    {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    {"corda_config": {"corda_method": "ipm"}},
    {"lora_ga_config": {"direction": "ArB2r"}},
    {"eva_config": {"rho": 2.0}},
    {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "swift_type": "LORA"},
    {"unsloth_training_method": "qlora", "auto_mapping": {"unsloth_fixed": True}},
    {"enable_lora": None, "merge_weights": False, "model_key_mapping": None},
]
"""What initialisations and trainers leave behind, beside `init_lora_weights: true`."""


@pytest.mark.parametrize("fields", LEFTOVERS, ids=lambda fields: next(iter(fields)))
def test_what_is_left_over_has_no_effect(fields: dict[str, Any]) -> None:
    assert PeftConfig.parse(config(**fields)) == PeftConfig.parse(config())


@pytest.mark.parametrize(
    "kind", ["lora_ga", "lora-ga", "CorDA", "pissa_niter_16", "olora", "loftq"]
)
def test_what_changed_the_base_is_refused_until_it_is_converted(kind: str) -> None:
    with pytest.raises(InvalidAdapter, match=r"init_lora_weights is .*base model's weights"):
        PeftConfig.parse(config(init_lora_weights=kind))


@pytest.mark.parametrize("kind", [True, False, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_initialisations_that_leave_the_base_as_it_was(kind: object) -> None:
    assert PeftConfig.parse(config(init_lora_weights=kind)) == PeftConfig.parse(config())


def test_an_initialisation_that_nobody_knows() -> None:
    with pytest.raises(InvalidAdapter, match=r"init_lora_weights is .*not known; write true if"):
        PeftConfig.parse(config(init_lora_weights="milora"))


def test_a_scale_option_that_is_null_is_absent() -> None:
    assert PeftConfig.parse(config(use_rslora=None)) == PeftConfig.parse(config())
