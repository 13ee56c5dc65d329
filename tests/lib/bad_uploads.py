"""Uploads that must be refused, each with one fault, and part of the message that says so.

They can be given to the store and sent over the wire.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapter_files import (
    CONFIG,
    Declared,
    Shape,
    Tensor,
    Tensors,
    Upload,
    config,
    good_upload,
    header_of,
    pack,
    tensors,
    upload,
    weights,
)

MAX_RANK = 256


@dataclass(frozen=True)
class BadUpload:
    """Makes the upload for a base model; its refusal's message contains `message`."""

    make: Callable[[Shape], Upload]
    message: str


def _named(name: str) -> Callable[[Shape], Upload]:
    return lambda shape: good_upload(shape, name)


def _declared(change: Callable[[tuple[Declared, ...]], Sequence[Declared]]) -> Any:
    def make(shape: Shape) -> Upload:
        good = good_upload(shape)
        return replace(good, files=tuple(change(good.files)))

    return make


def _configured(**changes: Any) -> Callable[[Shape], Upload]:
    return lambda shape: upload(config(**changes), weights(tensors(shape)))


def _config_bytes(data: bytes) -> Callable[[Shape], Upload]:
    return lambda shape: upload(data, weights(tensors(shape)))


def _raw(fields: str) -> Callable[[Shape], Upload]:
    """The usual configuration with fields as JSON would not write them."""
    usual = json.loads(config())
    for name in list(usual):
        if f'"{name}"' in fields:
            del usual[name]
    text = json.dumps(usual)[:-1] + ", " + fields[1:]
    return _config_bytes(text.encode())


def _weights_bytes(change: Callable[[bytes], bytes]) -> Callable[[Shape], Upload]:
    return lambda shape: upload(config(), change(weights(tensors(shape))))


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Shape], Upload]:
    def make(shape: Shape) -> Upload:
        parts = tensors(shape)
        header = header_of(parts)
        changed = change(header)
        data = b"".join(tensor.data for tensor in parts.values())
        return upload(config(), pack(header if changed is None else changed, data))

    return make


def _tensors(change: Callable[[Tensors, Shape], None], **made: Any) -> Callable[[Shape], Upload]:
    def make(shape: Shape) -> Upload:
        parts = tensors(shape, **made)
        change(parts, shape)
        return upload(config(made.get("rank", 4)), weights(parts))

    return make


def _first(matrix: str) -> str:
    return f"base_model.model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight"


def _drop(*names: str) -> Callable[[Tensors, Shape], None]:
    def change(parts: Tensors, _: Shape) -> None:
        for name in names:
            del parts[name]

    return change


def _add(name: str) -> Callable[[Tensors, Shape], None]:
    return lambda parts, _: parts.update({name: Tensor("F32", (1,), b"\0\0\0\0")})


def _resize(matrix: str, rows: int = 0, columns: int = 0) -> Callable[[Tensors, Shape], None]:
    def change(parts: Tensors, _: Shape) -> None:
        old = parts[_first(matrix)]
        size = (old.shape[0] + rows, old.shape[1] + columns)
        parts[_first(matrix)] = Tensor("F32", size, bytes(4 * size[0] * size[1]))

    return change


def _reshape(matrix: str, reshaped: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Any:
    def change(parts: Tensors, _: Shape) -> None:
        old = parts[_first(matrix)]
        parts[_first(matrix)] = replace(old, shape=reshaped(old.shape))

    return change


def _last_element(data: bytes) -> Callable[[Tensors, Shape], None]:
    """The last element of the last tensor is `data`."""

    def change(parts: Tensors, _: Shape) -> None:
        name, old = list(parts.items())[-1]
        parts[name] = replace(old, data=old.data[: -len(data)] + data)

    return change


def _entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[_first("A")].update(fields)


def _shift(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """Move one tensor's place, with a shape that fits."""

    def change(header: dict[str, Any]) -> None:
        entry = header[_first("B")]
        entry["data_offsets"][0] += begin
        entry["data_offsets"][1] += end
        entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4]

    return change


def _twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + f', "{_first("A")}": {json.dumps(header[_first("A")])}}}').encode()


LARGEST_F32 = b"\xff\xff\x7f\x7f"
NAN_F32, INFINITY_F16, NAN_BF16 = b"\x00\x00\xc0\x7f", b"\x00\x7c", b"\xc1\xff"
CONVERT = "granatum adapters convert"
A_PATTERN_WITHOUT_END = "(.*a?)" * 150 + "x"

BAD_UPLOADS: dict[str, BadUpload] = {
    # what is declared
    "no name": BadUpload(_named(""), "no valid adapter name"),
    "upper case in the name": BadUpload(_named("Adapter"), "no valid adapter name"),
    "path in the name": BadUpload(_named("../other/adapter"), "no valid adapter name"),
    "version in the name": BadUpload(_named("adapter@1"), "no valid adapter name"),
    "long name": BadUpload(_named("a" * 65), "no valid adapter name"),
    "no files": BadUpload(_declared(lambda _: ()), "declares no files"),
    "no weights": BadUpload(_declared(lambda files: files[:1]), "declare adapter_config.json and"),
    "no configuration": BadUpload(_declared(lambda files: files[1:]), "in this order"),
    "files in the wrong order": BadUpload(_declared(lambda files: files[::-1]), "in this order"),
    "a file twice": BadUpload(_declared(lambda files: (*files, files[1])), "each once"),
    "path in a file's name": BadUpload(
        _declared(lambda files: (replace(files[0], name=f"../{CONFIG}"), files[1])),
        "a file's name must not be a path",
    ),
    "adapter_model.bin": BadUpload(
        _declared(lambda files: (files[0], replace(files[1], name="adapter_model.bin"))), CONVERT
    ),
    "another file": BadUpload(
        _declared(lambda files: (*files, replace(files[0], name="tokenizer.json"))),
        "'tokenizer.json' is no part of an adapter",
    ),
    "empty file": BadUpload(
        _declared(lambda files: (files[0], replace(files[1], size_bytes=0))), "declared empty"
    ),
    "too many bytes declared": BadUpload(
        _declared(lambda files: (files[0], replace(files[1], size_bytes=1 << 40))), "allowed"
    ),
    "configuration too large": BadUpload(
        _declared(lambda files: (replace(files[0], size_bytes=1 << 30), files[1])), "allowed"
    ),
    "malformed sha256": BadUpload(
        _declared(lambda files: (files[0], replace(files[1], sha256="abc"))), "64 hexadecimal"
    ),
    # what arrives
    "another sha256": BadUpload(
        _declared(lambda files: (files[0], replace(files[1], sha256="0" * 64))),
        "adapter_model.safetensors: the bytes that arrived have SHA-256",
    ),
    "configuration of another sha256": BadUpload(
        _declared(lambda files: (replace(files[0], sha256="0" * 64), files[1])),
        "adapter_config.json: the bytes that arrived have SHA-256",
    ),
    "bytes missing": BadUpload(
        lambda shape: replace(good_upload(shape), data=good_upload(shape).data[:-5]),
        "5 bytes short",
    ),
    "nothing sent": BadUpload(
        lambda shape: replace(good_upload(shape), data=b""), "adapter_config.json: the upload ended"
    ),
    "bytes too many": BadUpload(
        lambda shape: replace(good_upload(shape), data=good_upload(shape).data + b"x"),
        "more bytes arrived",
    ),
    # the configuration
    "configuration is not JSON": BadUpload(_config_bytes(b"r = 4"), "is not JSON"),
    "configuration is no object": BadUpload(_config_bytes(b"[4]"), "is not a JSON object"),
    "configuration nested deeply": BadUpload(_config_bytes(b"[" * 200_000), "is not JSON"),
    "not LoRA": BadUpload(_configured(peft_type="IA3"), "peft_type"),
    "not a language model": BadUpload(_configured(task_type="SEQ_CLS"), "task_type"),
    "DoRA": BadUpload(_configured(use_dora=True), "use_dora"),
    "biases": BadUpload(_configured(bias="all"), "bias"),
    "whole modules": BadUpload(_configured(modules_to_save=["lm_head"]), "modules_to_save"),
    "option of tomorrow": BadUpload(_configured(use_more=True), "use_more"),
    "PiSSA": BadUpload(_configured(init_lora_weights="pissa"), "init_lora_weights"),
    "a field twice": BadUpload(_raw('{"r": 4, "r": 8}'), "names 'r' twice"),
    "a pattern twice": BadUpload(_raw('{"rank_pattern": {"a": 1, "a": 2}}'), "names 'a' twice"),
    "rank of 4,000 digits": BadUpload(_raw('{"r": 1%s}' % ("0" * 4000)), "r must be a whole"),
    "rank of 5,000 digits": BadUpload(_raw('{"r": 1%s}' % ("0" * 5000)), "is not JSON"),
    "rank in a pattern of 4,000 digits": BadUpload(
        _raw('{"rank_pattern": {"q_proj": 1%s}}' % ("0" * 4000)), "rank_pattern['q_proj'] must be"
    ),
    "rank 1e999": BadUpload(_raw('{"r": 1e999}'), "r must be a whole number"),
    "rank 4.0": BadUpload(_raw('{"r": 4.0}'), "r must be a whole number"),
    "rank true": BadUpload(_raw('{"r": true}'), "r must be a whole number"),
    "alpha of 4,000 digits": BadUpload(
        _raw('{"lora_alpha": 1%s}' % ("0" * 4000)), "lora_alpha must be a finite number"
    ),
    "alpha 1e999": BadUpload(_raw('{"lora_alpha": 1e999}'), "lora_alpha must be a finite number"),
    "alpha NaN": BadUpload(_raw('{"lora_alpha": NaN}'), "lora_alpha must be a finite number"),
    "alpha -Infinity": BadUpload(_raw('{"lora_alpha": -Infinity}'), "lora_alpha must be a finite"),
    "alpha true": BadUpload(_raw('{"lora_alpha": true}'), "lora_alpha must be a number"),
    "alpha in a pattern 1e999": BadUpload(
        _raw('{"alpha_pattern": {"q_proj": 1e999}}'), "alpha_pattern['q_proj'] must be"
    ),
    "an option nested deeply": BadUpload(
        _raw('{"use_dora": ' + "[" * 400 + "]" * 400 + "}"), "nested more than"
    ),
    "lone surrogates": BadUpload(
        _raw('{"rank_pattern": {"\\ud800(": 4}}'), "the pattern '\\ud800(' is no regular expression"
    ),
    "lone surrogates in an option": BadUpload(_raw('{"\\udfff": 1}'), "'\\udfff' is '1'"),
    "many patterns": BadUpload(
        _configured(rank_pattern={f"x{n}": 1 for n in range(2_001)}), "2,001 patterns"
    ),
    "a long pattern": BadUpload(_configured(targets="q" * 1_001), "longer than 1,000"),
    "many names of lists of layers": BadUpload(
        _configured(layers_to_transform=[0], layers_pattern=[f"a{n}" for n in range(10_000)]),
        "layers_pattern must be",
    ),
    "rank 0": BadUpload(_configured(rank=0), "r must be a whole number"),
    "rank above the limit": BadUpload(_configured(rank=MAX_RANK + 1), "above the limit of 256"),
    "no such module": BadUpload(_configured(targets=("c_attn",)), "matches no module"),
    "output layer": BadUpload(_configured(targets=("q_proj", "lm_head")), "matches lm_head"),
    "embeddings": BadUpload(_configured(targets=("embed_tokens",)), "matches model.embed_tokens"),
    "malformed pattern": BadUpload(_configured(targets="(q_proj"), "no regular expression"),
    "pattern without end": BadUpload(_configured(targets=A_PATTERN_WITHOUT_END), "target_modules"),
    # the file of weights
    "zip archive": BadUpload(_weights_bytes(lambda data: b"PK\x03\x04" + data), CONVERT),
    "pickle": BadUpload(_weights_bytes(lambda _: b"\x80\x02}q\x00X\x01\x00\x00\x00a."), CONVERT),
    "cut off": BadUpload(_weights_bytes(lambda data: data[:-4]), "cut off"),
    "cut off in the header": BadUpload(_weights_bytes(lambda data: data[:40]), "cut off"),
    "cut off at once": BadUpload(_weights_bytes(lambda data: data[:5]), "shorter than"),
    "endless header": BadUpload(_weights_bytes(lambda data: b"\xff" * 8 + data), "claims a header"),
    "header is not JSON": BadUpload(_header(lambda _: b"{nonsense"), "header is not JSON"),
    "header is no object": BadUpload(_header(lambda _: []), "header is not a JSON object"),
    "bytes at the end": BadUpload(_weights_bytes(lambda d: d + b"more"), "4 bytes at its end"),
    "a tensor twice": BadUpload(_header(_twice), "twice"),
    "overlapping tensors": BadUpload(_header(_shift(-16, 0)), "overlaps"),
    "hole between tensors": BadUpload(_header(_shift(16, 0)), "belong to no tensor"),
    "negative offset": BadUpload(_header(_entry(data_offsets=[-4, 4])), "data_offsets"),
    "offset beyond numbers": BadUpload(_header(_entry(data_offsets=[0, 2**80])), "data_offsets"),
    "shape does not fit": BadUpload(_header(_entry(shape=[3, 3])), "do not hold shape"),
    "shape of truths": BadUpload(_header(_entry(shape=[True, 3])), "shape"),
    "dtype of another kind": BadUpload(_header(_entry(dtype=["F32"])), "cannot be served"),
    "dtype null": BadUpload(_header(_entry(dtype=None)), "cannot be served"),
    "shape of 4,000 digits": BadUpload(_header(_entry(shape=[10**4000, 0])), "shape"),
    "shape of fractions": BadUpload(_header(_entry(shape=[4.0, 16.0])), "shape"),
    "many dimensions": BadUpload(_header(_entry(shape=[1] * 9)), "shape"),
    "offset NaN": BadUpload(_header(_entry(data_offsets=[0, float("nan")])), "data_offsets"),
    "offset infinite": BadUpload(_header(_entry(data_offsets=[0, float("inf")])), "data_offsets"),
    "header nested deeply": BadUpload(
        _header(lambda _: b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"), "nested more than"
    ),
    "header nested without end": BadUpload(_header(lambda _: b"[" * 100_000), "is not JSON"),
    "header of another encoding": BadUpload(_header(lambda _: b"\xff\xfe{\x00}\x00"), "the header"),
    "tensor of lone surrogates": BadUpload(_tensors(_add("\ud800")), "would not be applied"),
    "integers": BadUpload(_header(_entry(dtype="I8")), "dtype 'I8' cannot be served"),
    "double precision": BadUpload(_header(_entry(dtype="F64")), "dtype 'F64' cannot be served"),
    "metadata of numbers": BadUpload(
        _header(lambda header: header.update(__metadata__={"a": 1})), "__metadata__"
    ),
    # the tensors
    "no tensors": BadUpload(_tensors(lambda parts, _: parts.clear()), "are missing"),
    "A missing": BadUpload(_tensors(_drop(_first("A"))), f"{_first('A')} is missing, though"),
    "B missing": BadUpload(_tensors(_drop(_first("B"))), f"{_first('B')} is missing, though"),
    "module missing": BadUpload(_tensors(_drop(_first("A"), _first("B"))), "are missing"),
    "module not targeted": BadUpload(
        _tensors(_add(_first("A").replace("q_proj", "k_proj"))), "does not target its module"
    ),
    "layer too many": BadUpload(
        _tensors(_add(_first("A").replace("layers.0", "layers.9999"))), "layers"
    ),
    "tensor of a base weight": BadUpload(
        _tensors(_add("model.embed_tokens.weight")), "would not be applied"
    ),
    "path in a tensor's name": BadUpload(
        _tensors(_add("../../" + _first("A"))), "its name looks like a path"
    ),
    "two names of one tensor": BadUpload(
        _tensors(_add(_first("A").replace("lora_A", "lora_A.default"))), "are the same one"
    ),
    "magnitudes of DoRA": BadUpload(
        _tensors(_add(_first("A").replace("lora_A", "lora_magnitude_vector"))), "DoRA"
    ),
    "bias of B": BadUpload(
        _tensors(_add(_first("B").replace("weight", "bias"))), "biases of LoRA's own"
    ),
    "another rank in A": BadUpload(
        _tensors(_resize("A", rows=1)), "adapter_config.json gives its module rank 4"
    ),
    "another rank in B": BadUpload(
        _tensors(_resize("B", columns=4)), "adapter_config.json gives its module rank 4"
    ),
    "input of another model": BadUpload(_tensors(_resize("A", columns=8)), "another base model"),
    "output of another model": BadUpload(_tensors(_resize("B", rows=8)), "another base model"),
    "transposed": BadUpload(_tensors(_reshape("A", lambda s: s[::-1])), "another base model"),
    "flat": BadUpload(_tensors(_reshape("A", lambda s: (s[0] * s[1],))), "another base model"),
    "a number beyond computing": BadUpload(_tensors(_last_element(LARGEST_F32)), "cannot compute"),
    "NaN": BadUpload(_tensors(_last_element(NAN_F32)), "is NaN or infinite"),
    "infinity in float16": BadUpload(
        _tensors(_last_element(INFINITY_F16), dtype="F16"), "is NaN or infinite"
    ),
    "NaN in bfloat16": BadUpload(
        _tensors(_last_element(NAN_BF16), dtype="BF16"), "is NaN or infinite"
    ),
}
