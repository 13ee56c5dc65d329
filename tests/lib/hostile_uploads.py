"""Uploads of adapters of the tiny model, tampered with."""

import dataclasses
import hashlib
import json
from typing import Any

import adapter_files as files
from hypothesis import strategies as st
from wire_inputs import INF, NAN, ODD_TEXTS, Input

from granatum.v1 import adapters_pb2

HIDDEN, INNER, QUERY, KEY = 128, 384, 128, 64
SHAPE = files.Shape(
    5,
    {
        "q_proj": (HIDDEN, QUERY),
        "k_proj": (HIDDEN, KEY),
        "v_proj": (HIDDEN, KEY),
        "o_proj": (QUERY, HIDDEN),
        "gate_proj": (HIDDEN, INNER),
        "up_proj": (HIDDEN, INNER),
        "down_proj": (INNER, HIDDEN),
    },
)
_JSON_VALUES: tuple[Any, ...] = (
    0, -1, 1, 64, 65, 256, 10**9, 10**30, 1e308, 1e-300, NAN, INF, True, False, None, "", "x", "\0",
    [], {}, ["q_proj"], ["q_proj"] * 5000, "all-linear", "(a+)+$", ".*" * 300, "[^a]" * 200,
    {"q_proj": 4}, {".*": 128}, {"(a|a)*" * 30: 8}, {str(n): 1 for n in range(300)},
)  # fmt: skip
_CONFIG_FIELDS = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "bias", "use_dora",
    "use_rslora", "peft_type", "task_type", "layers_to_transform", "layers_pattern",
    "modules_to_save", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "megatron_config",
    "surprise", "target_parameters",
)  # fmt: skip


_TEMPLATES = (
    "{{ messages[0].content }}>", "{{ messages }}{{ tools }}", "{{ 1 / 0 }}", "{{ 9 ** 9 ** 9 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 9999999999 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '\\ud800' }}",
    "{{ ''.__class__.__mro__ }}", "{{ raise_exception(messages[0].content) }}", "{% if %}",
    "{% include '/etc/passwd' %}", "{{" + "(" * 9_000, "{{ a }}" * 30_000, "",
)  # fmt: skip
_CHATS = (
    *(json.dumps({"chat_template": text, "end_tokens": ["<pad>"]}).encode() for text in _TEMPLATES),
    *(json.dumps({"end_tokens": tokens}).encode() for tokens in (["</s>"], ["x" * 999], "a", [1])),
    b"", b"{", b"[" * 100_000, b'{"chat_template": "\\ud800"}', b"\xff", b" " * 300_000,
)  # fmt: skip


def uploads() -> st.SearchStrategy[Input]:
    """UploadAdapter: an adapter of the tiny model whose files or header were tampered with."""
    return st.builds(
        _upload,
        st.dictionaries(st.sampled_from(_CONFIG_FIELDS), st.sampled_from(_JSON_VALUES), max_size=2),
        st.sampled_from((1, 4, 64, 65, 128, 256)),
        st.sampled_from((0.02, 0.02, 1.0, 1e4, 1e15, 1e30, 3e38)),
        st.sampled_from(
            (
                "as it is",
                "as it is",
                "chat",
                "chat",
                "flip",
                "cut",
                "header",
                "more",
                "lie",
                "names",
            )
        ),
        st.integers(0, 2**16),
    )


def _upload(changes: dict[str, Any], rank: int, size: float, tampering: str, place: int) -> Input:
    config = files.config(rank, ("down_proj",), **changes)
    upload = files.upload(config, files.weights(_parts(rank, size)), "hostile")
    data = bytearray(upload.data)
    header = adapters_pb2.UploadHeader(name=upload.name)
    for declared in upload.files:
        header.files.add(**dataclasses.asdict(declared))
    match tampering:
        case "flip":
            data[place % len(data)] ^= 1 << (place % 8)
        case "cut":
            del data[place % len(data) :]
        case "more":
            data += b"x" * (1 + place % 100)
        case "header":
            data, header = _with_header(config, place, header)
        case "lie":
            header.files[place % 2].size_bytes = (0, 1, 2**63, 2**64 - 1)[place % 4]
        case "chat":
            chat = _CHATS[place % len(_CHATS)]
            sha256 = hashlib.sha256(chat).hexdigest()
            header.files.add(name="chat.json", size_bytes=len(chat), sha256=sha256)
            data += chat
        case "names":
            header.name = (*ODD_TEXTS, "x" * 10_000)[place % (len(ODD_TEXTS) + 1)]
    chunk = 1 + (place if place > 5000 else 1 << 19)
    messages = [adapters_pb2.UploadAdapterRequest(header=header)]
    for begin in range(0, len(data), chunk):
        messages.append(adapters_pb2.UploadAdapterRequest(chunk=bytes(data[begin : begin + chunk])))
    return Input(
        "AdapterService/UploadAdapter",
        tuple(message.SerializeToString() for message in messages),
        None,
    )


def _parts(rank: int, size: float) -> dict[str, files.Tensor]:
    parts = files.tensors(SHAPE, rank, ("down_proj",))
    if size == 0.02:
        return parts
    return {name: _filled(tensor, size) for name, tensor in parts.items()}


def _filled(tensor: files.Tensor, value: float) -> files.Tensor:
    import numpy as np

    data = np.full(tensor.shape, value, np.float32).astype("<f4").tobytes()
    return dataclasses.replace(tensor, data=data)


def _with_header(
    config: bytes, place: int, header: adapters_pb2.UploadHeader
) -> tuple[bytearray, adapters_pb2.UploadHeader]:
    """Weights with a false safetensors header, declared truly."""
    entry = {"dtype": "F32", "shape": [4, INNER], "data_offsets": [0, 8]}
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    texts = (
        json.dumps({name: {**entry, "shape": [10**30, 4]}}).encode(),
        json.dumps({name: {**entry, "data_offsets": [-8, 10**19]}}).encode(),
        json.dumps({name: {**entry, "shape": ["4", None]}}).encode(),
        json.dumps({name: {**entry, "dtype": "F8_E4M3"}}).encode(),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"x": 1e9999, "x": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
        b'{"\\ud800": 1}',
    )
    weights = files.pack(texts[place % len(texts)], b"\0" * 64)
    declared = adapters_pb2.UploadHeader(name=header.name)
    for file, data in ((files.CONFIG, config), (files.WEIGHTS, weights)):
        sha256 = hashlib.sha256(data).hexdigest()
        declared.files.add(name=file, size_bytes=len(data), sha256=sha256)
    return bytearray(config + weights), declared
