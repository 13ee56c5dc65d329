"""PEFT's options beyond plain LoRA. Those that change an adapter's answers are refused by name."""

import json
from collections.abc import Mapping
from typing import Any

from granatum.adapters_store.names import shown
from granatum.v1.errors import InvalidAdapter

_USED = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "peft_type",
        "task_type",
        "init_lora_weights",
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Options that steer training or bookkeeping alone, or belong to an option that is refused."""
_DEFAULTS: dict[str, object] = {"bias": "none", "loftq_config": {}}
"""The neutral values that are not null, false, or an empty list or text."""
_REASONS = {
    "alora_invocation_tokens": "it would apply to a part of the prompt only",
    "arrow_config": "it routes between adapters",
    "bias": "trained biases of the base model are not applied",
    "fan_in_fan_out": "the projections of the base model are not transposed",
    "kasa_config": "it changes the base model's weights",
    "layer_replication": "it changes the base model's layers",
    "loftq_config": "it changes the base model's weights",
    "lora_bias": "biases of LoRA's own matrices are not applied",
    "modules_to_save": "whole modules are not replaced",
    "target_parameters": "only modules can be adapted",
    "trainable_token_indices": "embeddings are shared by all tenants",
    "use_dora": "DoRA rescales the base model's weights",
    "use_qalora": "it pools the inputs",
}
# These initialisations subtract the untrained adapter from the base model's weights. The trained
# adapter then fits the changed base alone. PEFT can fold the change into the adapter.
_CONVERTIBLE = ("corda", "lora_ga", "olora", "pissa")


def check_options(fields: Mapping[str, Any]) -> None:
    """Raise InvalidAdapter for an option that would change the answers and is not supported."""
    if fields.get("peft_type") != "LORA":
        raise _refused("peft_type", fields.get("peft_type"), 'only "LORA" can be served')
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refused("task_type", fields["task_type"], 'only "CAUSAL_LM" can be served')
    _check_initialisation(fields.get("init_lora_weights", True))
    for name in sorted(fields.keys() - _USED - _WITHOUT_EFFECT):
        if not _is_neutral(name, fields[name]):
            reason = _REASONS.get(name, "this option is not supported")
            raise _refused(name, fields[name], f"{reason}; train without it")


def _check_initialisation(value: object) -> None:
    kind = value.lower() if isinstance(value, str) else ""
    if kind.startswith(_CONVERTIBLE):
        raise _refused(
            "init_lora_weights",
            value,
            "it changes the base model's weights; save the adapter again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if kind == "loftq":
        raise _refused("init_lora_weights", value, _REASONS["loftq_config"])


def _is_neutral(name: str, value: object) -> bool:
    default = name in _DEFAULTS and value == _DEFAULTS[name]
    return default or value is None or value is False or value in ([], "")


def _refused(name: str, value: object, reason: str) -> InvalidAdapter:
    option = name if name.isidentifier() and len(name) <= 64 else shown(name)
    return InvalidAdapter(
        f"adapter_config.json: {option} is {shown(json.dumps(value))}: {reason}",
        field="adapter_config.json",
    )
