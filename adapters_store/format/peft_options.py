"""PEFT's options beyond plain LoRA. Those that change an adapter's answers are refused by name."""

import json
from collections.abc import Mapping
from typing import Any

from granatum.adapters_store.names import shown
from granatum.v1.errors import InvalidAdapter

USED = frozenset(
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
        "base_model_name_or_path",
        "revision",
    }
)
WITHOUT_EFFECT = frozenset(
    {
        # bookkeeping
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "runtime_config",
        # training alone: PEFT computes without them once the model is in evaluation
        "lora_dropout",
        "monteclora_config",
        "velora_config",
        # of an initialisation or an option that is refused, if it has an effect
        "corda_config",
        "eva_config",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "qalora_group_size",
        # PEFT sets it to false for every linear of the models that can be served
        "fan_in_fan_out",
        # of embeddings alone, which are refused
        "ensure_weight_tying",
        # what trainers add: ms-swift's optimizer and dtype of training, Unsloth's notes
        "lora_dtype",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "swift_type",
        "unsloth_fixed",
        "unsloth_training_method",
        "unsloth_version",
    }
)
"""Options that change no answer of an adapter that is taken."""
REASONS = {
    "alora_invocation_tokens": "it would apply to a part of the prompt only",
    "arrow_config": "it routes between adapters",
    "bias": "trained biases of the base model are not applied",
    "kasa_config": "it changes the base model's weights",
    "layer_replication": "it changes the base model's layers",
    "lora_bias": "biases of LoRA's own matrices are not applied",
    "megatron_config": "Megatron's layers are not those of Hugging Face: export the adapter to "
    "Hugging Face's names, without this option",
    "modules_to_save": "whole modules are not replaced",
    "target_parameters": "only modules can be adapted",
    "trainable_token_indices": "embeddings are shared by all tenants",
    "use_bdlora": "its matrices are cut into blocks",
    "use_dora": "DoRA rescales the base model's weights",
    "use_qalora": "it pools the inputs",
}
"""Why an option is refused unless it is neutral."""
_TASKS = {
    "SEQ_2_SEQ_LM": "this is the task of encoder-decoders such as T5, and a decoder is served here",
    "SEQ_CLS": "a classifier has a head of its own, which is not applied",
    "TOKEN_CLS": "a classifier has a head of its own, which is not applied",
    "QUESTION_ANS": "span extraction has a head of its own, which is not applied",
    "FEATURE_EXTRACTION": "embeddings of texts are not served",
}
_ACTIVE_IF_EMPTY = frozenset({"arrow_config", "kasa_config", "use_bdlora"})
"""Options for which PEFT reads `{}` as the option with its defaults."""
# These initialisations subtract the untrained adapter from the base model's weights. The trained
# adapter then fits the changed base alone. PEFT can fold the change into the adapter.
_CONVERTIBLE = ("corda", "lora_ga", "olora", "pissa")
_HARMLESS = frozenset(("gaussian", "eva", "orthogonal", "mica"))
"""Initialisations that leave the base model's weights as they are."""


def check_options(fields: Mapping[str, Any]) -> None:
    """Raise InvalidAdapter for an option that would change the answers and is not supported."""
    _check_kind(fields)
    _check_initialisation(fields.get("init_lora_weights", True))
    for name in sorted(fields.keys() - USED - WITHOUT_EFFECT):
        if not _is_neutral(name, fields[name]):
            reason = REASONS.get(name, "this option is not supported")
            raise _refused(name, fields[name], f"{reason}; train without it")


def _check_kind(fields: Mapping[str, Any]) -> None:
    if "lora_parameters" in fields and "peft_type" not in fields:
        raise _refused(
            "lora_parameters",
            fields["lora_parameters"],
            "MLX wrote this folder: make a PEFT adapter of it with granatum adapters convert",
        )
    if fields.get("peft_type") != "LORA":
        raise _refused("peft_type", fields.get("peft_type"), 'only "LORA" can be served')
    task = fields.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        reason = _TASKS.get(str(task), "this task is not known")
        raise _refused(
            "task_type",
            task,
            f'{reason}; only "CAUSAL_LM" can be served: write that if the adapter was trained on '
            "a decoder alone, without a head",
        )


def _check_initialisation(value: object) -> None:
    if not isinstance(value, str):
        return
    kind = value.lower().replace("-", "_")  # ms-swift calls one lora-ga
    if kind.startswith(_CONVERTIBLE):
        raise _refused(
            "init_lora_weights",
            value,
            "it changes the base model's weights; save the adapter again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if kind == "loftq":
        raise _refused("init_lora_weights", value, "it changes the base model's weights")
    if kind not in _HARMLESS:
        raise _refused(
            "init_lora_weights",
            value,
            "this initialisation is not known; write true if it left the base model's weights as "
            "they were",
        )


def _is_neutral(name: str, value: object) -> bool:
    if name == "bias" and value == "none":
        return True
    if value == {}:
        return name not in _ACTIVE_IF_EMPTY
    return value is None or value in (False, [], "")  # 0 and 0.0 equal False


def _refused(name: str, value: object, reason: str) -> InvalidAdapter:
    option = name if name.isidentifier() and len(name) <= 64 else shown(name)
    return InvalidAdapter(
        f"adapter_config.json: {option} is {shown(json.dumps(value))}: {reason}",
        field="adapter_config.json",
    )
