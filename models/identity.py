"""What makes a base model this one and no other: its shape, weights, tokenizer and end tokens.

Two models of one shape, such as a base model and its instruct version, must never share a fleet.
If they did, a stream could go on with the other model's weights, and an adapter could be added to
weights that it was not trained on. A fingerprint is 64 hexadecimal digits, 16 for each of `PARTS`
in order. Whoever compares two fingerprints can therefore say which part differs.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from granatum.models.checkpoint import Tensor, tensors_of, weight_files
from granatum.models.config_fields import Fields
from granatum.models.folder import CONFIG_FILE, read_whole
from granatum.v1.errors import InvalidRequest

PARTS = ("shape", "weights", "tokenizer", "end tokens")

_DIGITS = 16
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
# Models up to this many bytes are read in full. Of a larger model, a few blocks of each tensor are
# read, evenly spaced. Training changes nearly every number of a tensor, so the blocks differ. A few
# numbers that somebody changes by hand can stay unseen.
_READ_IN_FULL = 64 << 20
_BLOCKS = 8
_BLOCK_BYTES = 4096


def fingerprint(shape: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> str:
    """The fingerprint of the model in `folder`; `config` is what its config.json says.

    A folder without weights, tokenizer or end tokens has a fingerprint as well. Raises
    InvalidRequest for a file that cannot be read, or that is not whole.
    """
    try:
        parts = (
            _canonical(shape),
            _weights_digest(folder),
            _tokenizer_digest(folder),
            _canonical(sorted({str(token) for token in end_tokens(config, folder)})),
        )
    except OSError as error:
        raise InvalidRequest(
            f"{error.filename or folder} cannot be read ({error.strerror}): "
            "every file of the model must be readable"
        ) from error
    return "".join(hashlib.sha256(part).hexdigest()[:_DIGITS] for part in parts)


def differences(one: str, other: str) -> tuple[str, ...]:
    """The parts in which the models of two fingerprints differ."""
    return tuple(
        part
        for index, part in enumerate(PARTS)
        if _digits_of(one, index) != _digits_of(other, index)
    )


def end_tokens(config: Mapping[str, Any], folder: Path) -> list[int]:
    """The ids that end a sequence, as config.json (`config`) and generation_config.json name them.

    Raises InvalidRequest for a generation_config.json that is not JSON, and for ids that are none.
    """
    file = folder / "generation_config.json"
    try:
        found = json.loads(read_whole(file))
        generation = found if isinstance(found, dict) else {}
    except FileNotFoundError:
        generation = {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{file} is not JSON ({error}): take the file that was published with the model"
        ) from error
    stated = Fields(config, f"{folder / CONFIG_FILE}: "), Fields(generation, f"{file}: ")
    return [token for settings in stated for token in settings.ids("eos_token_id")]


def _digits_of(whole: str, index: int) -> str:
    return whole[index * _DIGITS : (index + 1) * _DIGITS]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _weights_digest(folder: Path) -> bytes:
    tensors = [tensor for file in weight_files(folder) for tensor in tensors_of(file)]
    in_full = sum(tensor.size for tensor in tensors) <= _READ_IN_FULL
    digest = hashlib.sha256()
    # Sorted by name, so that the digest does not depend on how the model is cut into files.
    for tensor in sorted(tensors, key=lambda tensor: (tensor.name, tensor.file)):
        digest.update(_canonical([tensor.name, tensor.kind, tensor.size]))
        with tensor.file.open("rb", buffering=0) as file:
            for begin, size in _blocks(tensor, in_full):
                digest.update(os.pread(file.fileno(), size, begin))
    return digest.digest()


def _blocks(tensor: Tensor, in_full: bool) -> Iterator[tuple[int, int]]:
    """The parts of a tensor that are read, each as (begin, size)."""
    if in_full or tensor.size <= _BLOCKS * _BLOCK_BYTES:
        yield tensor.begin, tensor.size
        return
    last = tensor.size - _BLOCK_BYTES
    for index in range(_BLOCKS):
        yield tensor.begin + last * index // (_BLOCKS - 1), _BLOCK_BYTES


def _tokenizer_digest(folder: Path) -> bytes:
    """A digest of the files that turn texts and chats into ids, and ids into texts."""
    digest = hashlib.sha256()
    for pattern in _TOKENIZER:
        for file in sorted(folder.glob(pattern)):
            content = hashlib.sha256(read_whole(file)).digest()
            digest.update(file.name.encode() + b"\0" + content)
    return digest.digest()
