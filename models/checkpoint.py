"""The files with a model's weights: which of a folder's files they are, and where a tensor lies."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granatum.models.folder import ADAPTER_FILE, adapter_refusal, read_whole, refuse_pointer
from granatum.v1.errors import InvalidRequest

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""The file that says which file of the checkpoint holds which tensor."""
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor's bytes lie in its file; `kind` is its dtype and shape."""

    name: str
    kind: str
    file: Path
    begin: int
    size: int


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load: one file, or all files that the index names.

    Empty if the folder has no weights. Raises InvalidRequest for an index that is none, or that
    names a file which is not there.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        files = sorted(
            {folder / name for name in json.loads(read_whole(index))["weight_map"].values()}
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{index} is no index of weights: download it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InvalidRequest(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {index.name} names, "
            f"such as {missing[0]}: download the model again"
        )
    return files


def required_weight_files(folder: Path) -> list[Path]:
    """As `weight_files`; raises InvalidRequest also if there are none, and says what to do.

    An adapter beside the weights is refused, since transformers would compute with it.
    """
    if files := weight_files(folder):
        if (folder / ADAPTER_FILE).exists():
            raise InvalidRequest(
                f"{folder} holds a model and an adapter: move {ADAPTER_FILE} and the adapter's "
                "weights to a folder of their own, and upload that"
            )
        return files
    message = f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    if any(folder.glob("*.bin")):
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}).save_pretrained('converted')"
        )
        message += (
            ". A server reads no .bin files, as pickles may run any code: convert them with "
            f'`python -c "{code}"`, and copy the tokenizer beside them'
        )
    elif any(folder.glob("*.gguf")):
        message += ": give the model in safetensors, not in GGUF"
    elif (folder / ADAPTER_FILE).exists():
        message = adapter_refusal(folder)
    elif others := sorted(file.name for file in folder.glob("*.safetensors")):
        message += (
            f", only such files as {others[0]}: download the model with all its files, in the "
            "format of transformers"
        )
    else:
        message += ": download the model with all its files"
    raise InvalidRequest(message)


def tensors_of(file: Path) -> Iterator[Tensor]:
    """The tensors that a safetensors file's header names.

    Raises InvalidRequest for a file that is none, or that is cut off.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        begin = opened.read(_LENGTH_BYTES)
        data = _LENGTH_BYTES + int.from_bytes(begin, "little")
        rest = opened.read(min(data - _LENGTH_BYTES, size))
    refuse_pointer(file, begin + rest)
    if data > size:
        raise InvalidRequest(f"{file} is empty, cut off or no safetensors: download it again")
    try:
        header = json.loads(rest)
        named = [(name, header[name]) for name in header.keys() - {"__metadata__"}]
        found = [_tensor(name, fields, file, data) for name, fields in named]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequest(f"{file} is no safetensors: download it again") from error
    end = max((tensor.begin + tensor.size for tensor in found), default=data)
    if end != size:
        raise InvalidRequest(
            f"{file} has {size:,} bytes, where its header speaks of {end:,}: download it again"
        )
    yield from found


def _tensor(name: str, fields: Mapping[str, Any], file: Path, data: int) -> Tensor:
    begin, end = (data + offset for offset in fields["data_offsets"])
    if type(begin) is not int or type(end) is not int or not data <= begin <= end:
        raise ValueError(f"{name} lies outside {file}")
    return Tensor(name, f"{fields['dtype']}{fields['shape']}", file, begin, end - begin)
