"""Inputs for every public RPC, right ones and wrong ones, drawn by Hypothesis.

Each input knows which fields are wrong, if that is certain, by rules that are written here anew:
nothing of the code under test decides what it should refuse. Where nothing is certain (`wrong` is
None), any answer will do that a sane service gives.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import adapter_files as files
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from granatum.v1 import adapters_pb2, cluster_pb2, inference_pb2
from granatum.v1.inference_pb2 import GenerateRequest

VOCABULARY = 259
"""Of the tiny base model."""
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
MANY = 1 << 20
ODD_TEXTS = (
    "\0", "\n", "\ufeff", "\uffff", "\u202e", "é" * 7, "👩‍👩‍👧‍👦", "\U0010ffff", "a\u0300" * 9,
    "<s>", "</s>", "<pad>", "%s%n", "../../etc/passwd", "{{7*7}}", "'; DROP TABLE x;--", "sha256:",
    "sha256:" + "0" * 64, "acme/x@1", "@", "/", "x@0", "x@99999999999", "name@1@2",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One call: the method's path, its messages on the wire, and what is wrong with it."""

    method: str
    messages: tuple[bytes, ...]
    wrong: frozenset[str] | None = frozenset()
    """The fields of which one must be named; empty: nothing is wrong; None: who knows."""
    as_admin: bool = False

    def __repr__(self) -> str:
        sizes = [len(message) for message in self.messages]
        shown = [message[:200] for message in self.messages[:2]]
        return f"Input({self.method}, wrong={self.wrong}, sizes={sizes[:5]}, {shown})"


def inputs() -> st.SearchStrategy[Input]:
    """Any input of any public RPC."""
    return st.one_of(
        generations(),
        generations(),
        generations(),
        anything(),
        uploads(),
        uploads(),
        with_uploads(),
        garbage(),
    )


# --- GenerateRequest: a right request, of which some fields are made wrong --------------------

Change = Callable[[GenerateRequest], None]


def _set(path: str, value: Any) -> Change:
    def change(request: GenerateRequest) -> None:
        *parents, name = path.split(".")
        target: Any = request
        for parent in parents:
            target = getattr(target, parent)
        if isinstance(value, list):
            del getattr(target, name)[:]
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)

    return change


def _chat(messages: list[tuple[str, str]]) -> Change:
    def change(request: GenerateRequest) -> None:
        request.chat.Clear()
        for role, content in messages:
            request.chat.messages.add(role=role, content=content)
        request.chat.SetInParent()

    return change


def _cleared(request: GenerateRequest) -> None:
    request.ClearField("prompt")


NAN, INF = math.nan, math.inf
WRONG: tuple[tuple[str, Change], ...] = (
    *(
        (f"sampling.{name}", _set(f"sampling.{name}", value))
        for name, values in {
            "temperature": (-1.0, 1e-39, 1e-30, -0.001, 101.0, 3e38, NAN, INF, -INF),
            "top_p": (0.0, -1.0, 1.5, NAN, INF),
            "min_p": (-0.5, 1.5, NAN, INF),
            "repetition_penalty": (0.0, -1.0, 1e-40, 1e-6, 1e30, NAN, INF),
            "presence_penalty": (-3.0, 3.0, 1e38, NAN, INF),
            "frequency_penalty": (-3.0, 3.0, 1e38, NAN, -INF),
            "top_k": (2**31, 2**32 - 1),
        }.items()
        for value in values
    ),
    ("stop.max_tokens", _set("stop.max_tokens", 0)),
    ("stop.max_tokens", _set("stop.max_tokens", 2**32 - 1)),
    ("stop.min_tokens", _set("stop.min_tokens", 2**32 - 1)),
    ("stop.min_tokens", _set("stop.min_tokens", 1_000)),
    ("stop.token_ids", _set("stop.token_ids", [4_000_000_000])),
    ("stop.token_ids", _set("stop.token_ids", [0, VOCABULARY])),
    ("stop.token_ids", _set("stop.token_ids", list(range(100)))),
    ("stop.strings", _set("stop.strings", ["x"] * 1000)),
    ("stop.strings", _set("stop.strings", ["x", ""])),
    ("stop.strings", _set("stop.strings", ["x" * 100_000])),
    ("logprobs.top", _set("logprobs.top", 21)),
    ("logprobs.top", _set("logprobs.top", 2**32 - 1)),
    ("priority", _set("priority", 2**31 - 1)),
    ("priority", _set("priority", -(2**31))),
    ("priority", _set("priority", 1)),
    ("request_id", _set("request_id", "x" * 10_000)),
    ("request_id", _set("request_id", "a b")),
    ("request_id", _set("request_id", "\0")),
    ("adapter", _set("adapter", "x" * 100_000)),
    *(("adapter", _set("adapter", text)) for text in ("../x", "A", "x@0", "sha256:zz", "x y")),
    ("prompt", _cleared),
    ("prompt", _set("prompt", "")),
    ("prompt", _set("prompt", "a" * 300)),
    ("prompt", _set("prompt", "ab " * 1_300_000)),
    ("prompt", _set("prompt", "é" * 2_500_000)),
    ("token_ids", _set("token_ids.ids", [])),
    ("token_ids", _set("token_ids.ids", [VOCABULARY])),
    ("token_ids", _set("token_ids.ids", [1, 2**32 - 1])),
    ("token_ids", _set("token_ids.ids", [1] * MANY)),
    ("token_ids", _set("token_ids.ids", [1] * (MANY + 1))),
    ("chat", _chat([])),
    ("chat", _chat([("", "x")])),
    ("chat", _chat([("r" * 1000, "x")])),
    ("chat", _chat([("user", "")])),
    ("chat", _chat([("user", "x")] * 5000)),
    ("chat", _chat([("user", "x" * 3_000_000)])),
)
"""A field (or where it begins) and a change that makes it wrong for the tiny model, whose context
is 256 tokens, and for a tenant's key without privileges."""


def _right() -> st.SearchStrategy[Change]:
    numbers = {
        "sampling.temperature": st.sampled_from((0.0, 0.001, 1.0, 100.0)),
        "sampling.top_p": st.floats(2**-10, 1, width=32),
        "sampling.min_p": st.floats(0, 1, width=32),
        "sampling.repetition_penalty": st.sampled_from((0.01, 1.0, 100.0)),
        "sampling.presence_penalty": st.floats(-2, 2, width=32),
        "sampling.frequency_penalty": st.floats(-2, 2, width=32),
        "sampling.top_k": st.sampled_from((0, 1, 7, VOCABULARY, 2**31 - 1)),
        "sampling.seed": st.sampled_from((0, 1, 2**64 - 1)),
        "stop.min_tokens": st.integers(0, 3),
        "stop.ignore_eos": st.booleans(),
        "stop.token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=64),
        "stop.strings": st.lists(st.text("abc\n👩é", min_size=1, max_size=9), max_size=16),
        "logprobs.top": st.integers(0, 20),
        "priority": st.sampled_from((0, -1, -1000)),
        "prompt": st.sampled_from(("granite>", "x", "\n", "\0", "<pad> hi", "é👩", "\U0010ffff")),
        "token_ids.ids": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=250),
    }
    return st.one_of(*(values.map(partial(_set, path)) for path, values in numbers.items()))


def generations() -> st.SearchStrategy[Input]:
    """Generate, with any number of fields changed rightly and often one or two wrongly."""

    def build(right: list[Change], wrong: list[tuple[str, Change]], tokens: int) -> Input:
        request = GenerateRequest(prompt="granite>")
        request.stop.max_tokens = tokens
        for change in right:
            change(request)
        for _, change in wrong:
            change(request)
        return Input(
            "InferenceService/Generate",
            (request.SerializeToString(),),
            frozenset(_wrong_fields(request, [field for field, _ in wrong])),
        )

    return st.builds(
        build,
        st.lists(_right(), max_size=5),
        st.lists(st.sampled_from(WRONG), max_size=2),
        st.integers(4, 12),
    )


def with_uploads() -> st.SearchStrategy[Input]:
    """Generate with what the uploads left behind, whatever that may be."""

    def build(right: list[Change]) -> Input:
        request = GenerateRequest(prompt="granite>", adapter="hostile")
        request.stop.max_tokens = 6
        for change in right:
            change(request)
        return Input("InferenceService/Generate", (request.SerializeToString(),), None)

    return st.builds(build, st.lists(_right(), max_size=3))


_INPUTS = {"prompt": "prompt", "token_ids": "token_ids", "chat": "chat"}


def _wrong_fields(request: GenerateRequest, changed: list[str]) -> Iterator[str]:
    """Of the fields that were made wrong, those that no later change has overwritten."""
    final = request.WhichOneof("input")
    for field in changed:
        root = field.partition(".")[0]
        if root not in _INPUTS or root == (final or "prompt"):
            yield field


# --- Everything else ---------------------------------------------------------------------------

UNARY: dict[str, type[Message]] = {
    "AdapterService/GetAdapter": adapters_pb2.GetAdapterRequest,
    "AdapterService/ListAdapters": adapters_pb2.ListAdaptersRequest,
    "AdapterService/DeleteAdapter": adapters_pb2.DeleteAdapterRequest,
    "AdapterService/SetAlias": adapters_pb2.SetAliasRequest,
    "AdapterService/DeleteAlias": adapters_pb2.DeleteAliasRequest,
    "AdapterService/SetVisibility": adapters_pb2.SetVisibilityRequest,
    "ClusterService/ListRunners": cluster_pb2.ListRunnersRequest,
    "ClusterService/DrainRunner": cluster_pb2.DrainRunnerRequest,
    "ClusterService/ResumeRunner": cluster_pb2.ResumeRunnerRequest,
    "InferenceService/Generate": inference_pb2.GenerateRequest,
}


def anything() -> st.SearchStrategy[Input]:
    """A random message of a random RPC, built from its proto."""

    def of(method: str) -> st.SearchStrategy[Input]:
        admin = method.startswith("ClusterService")
        return _message(UNARY[method].DESCRIPTOR).map(
            lambda m: Input(method, (m.SerializeToString(),), None, as_admin=admin)
        )

    return st.sampled_from(sorted(UNARY)).flatmap(of)


def garbage() -> st.SearchStrategy[Input]:
    """Bytes that are no message, or one with text that is no text."""
    methods = [*UNARY, "AdapterService/UploadAdapter"]
    surrogate = GenerateRequest(prompt="XX").SerializeToString().replace(b"XX", b"\xed\xa0")
    data = st.one_of(st.binary(max_size=60), st.sampled_from((surrogate, b"\xff" * 9, b"\x0a")))
    return st.builds(
        lambda method, parts: Input(
            method, tuple(parts), None, as_admin=method.startswith("ClusterService")
        ),
        st.sampled_from(methods),
        st.lists(data, min_size=1, max_size=1),
    )


_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (0.0, -0.0, 1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, NAN, INF, -INF)


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in _INTEGERS:
        least, most = _INTEGERS[field.type]
        return st.one_of(
            st.sampled_from((least, most, 0, 1, 255, most // 2)), st.integers(least, most)
        )
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return st.sampled_from(_FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from((0, 1, 2, 99, -1, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=30)
    names = st.sampled_from(("runner-x", "hostile", "mine", "mine@1", "acme/mine", ""))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return st.one_of(names, st.sampled_from(ODD_TEXTS), text, st.just("x" * 70_000))


def _message(descriptor: Any) -> st.SearchStrategy[Message]:
    from google.protobuf.message_factory import GetMessageClass

    def field_value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
        one = _message(field.message_type) if field.message_type else _value(field)
        return st.lists(one, max_size=4) if field.is_repeated else one

    def fill(values: dict[str, Any]) -> Message:
        message = GetMessageClass(descriptor)()
        for name, value in values.items():
            if isinstance(value, list):
                getattr(message, name).extend(value)
            elif isinstance(value, Message):
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    optional = {field.name: field_value(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=optional).map(fill)


# --- Uploads -----------------------------------------------------------------------------------

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


def uploads() -> st.SearchStrategy[Input]:
    """UploadAdapter: an adapter of the tiny model whose files or header were tampered with."""
    return st.builds(
        _upload,
        st.dictionaries(st.sampled_from(_CONFIG_FIELDS), st.sampled_from(_JSON_VALUES), max_size=2),
        st.sampled_from((1, 4, 64, 65, 128, 256)),
        st.sampled_from((0.02, 0.02, 1.0, 1e4, 1e15, 1e30, 3e38)),
        st.sampled_from(("as it is", "as it is", "flip", "cut", "header", "more", "lie", "names")),
        st.integers(0, 2**16),
    )


def _upload(changes: dict[str, Any], rank: int, size: float, tampering: str, place: int) -> Input:
    config = files.config(rank, ("down_proj",), **changes)
    parts = files.tensors(SHAPE, rank, ("down_proj",))
    if size != 0.02:
        parts = {name: _filled(tensor, size) for name, tensor in parts.items()}
    upload = files.upload(config, files.weights(parts), "hostile")
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


def _filled(tensor: files.Tensor, value: float) -> files.Tensor:
    import numpy as np

    data = np.full(tensor.shape, value, np.float32).astype("<f4").tobytes()
    return dataclasses.replace(tensor, data=data)


def _with_header(
    config: bytes, place: int, header: adapters_pb2.UploadHeader
) -> tuple[bytearray, adapters_pb2.UploadHeader]:
    """Weights whose safetensors header lies, declared truly."""
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
