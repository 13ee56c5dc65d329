"""A model folder's tokenizer, as its files describe it.

tokenizer.json says how texts become ids and ids become texts. The tokenizers library reads it here
as it stands. transformers 5 makes the tokenizers of many classes anew, from vocabulary and merges,
and loses the rest of the file: how digits are split, where a blank is put before a text, which
blanks a decoder strips. So transformers only reads the files beside tokenizer.json: the chat
template, the names of special tokens, and tokens that tokenizer.json does not have.
"""

import json
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from granatum.models.folder import read_whole
from granatum.v1.errors import InvalidRequest, PreconditionFailed

_FILE = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_BESIDE = (_SETTINGS, "special_tokens_map.json", "added_tokens.json")
_SENTENCEPIECE = "tokenizer.model"
_PUBLISHED = "take the file that was published with the model"

log = structlog.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_panic(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn a panic of the tokenizers library, which is no Exception, into a RuntimeError."""

    @wraps(call)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise RuntimeError("the tokenizers library panicked") from error

    return guarded


def read_tokenizer(directory: Path) -> tuple[Tokenizer, Any]:
    """The tokenizer of `directory`, and its settings: a tokenizer of transformers.

    Raises PreconditionFailed, with the file's name, if a file is missing or cannot be read, and
    InvalidRequest if its content was never downloaded.
    """
    fast = _fast(directory / _FILE)
    stated = {name: _stated(directory / name) for name in _BESIDE}
    settings = _settings(directory)
    own = fast.get_added_tokens_decoder()
    beside = settings.added_tokens_decoder
    fast.add_tokens([token for id_, token in sorted(beside.items()) if own.get(id_) != token])
    fast.encode_special_tokens = settings.split_special_tokens
    fast.no_truncation()
    fast.no_padding()
    _warn_of_contradictions(directory, stated[_SETTINGS], fast, settings)
    return fast, settings


def _fast(file: Path) -> Tokenizer:
    if not file.is_file():
        raise PreconditionFailed(f"{file.parent} holds no {_FILE}: {_remedy(file.parent)}")
    try:
        read_whole(file)
        fast = without_panic(Tokenizer.from_file)(str(file))
        without_panic(fast.encode)("")  # a bad post-processor is found by the first text alone
    except InvalidRequest:
        raise
    except Exception as error:  # the library raises nothing more exact
        raise PreconditionFailed(
            f"{file} cannot be read as a tokenizer ({error}): {_PUBLISHED}"
        ) from error
    return fast


def _remedy(directory: Path) -> str:
    """How `directory` gets the tokenizer.json that it lacks."""
    if not (directory / _SENTENCEPIECE).is_file():
        return _PUBLISHED
    # transformers 5 reads tokenizer.model otherwise than SentencePiece does.
    return (
        "make one with \"pip install 'transformers<5' sentencepiece protobuf\" and python -c "
        f'"from transformers import AutoTokenizer as A; A.from_pretrained({str(directory)!r})'
        f'.save_pretrained({str(directory)!r})"'
    )


def _stated(file: Path) -> Mapping[str, Any]:
    """What a file of settings says; nothing if it is not there."""
    try:
        stated = json.loads(read_whole(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise PreconditionFailed(f"{file} cannot be read ({error}): {_PUBLISHED}") from error
    if not isinstance(stated, dict):
        raise PreconditionFailed(f"{file} is not a JSON object: {_PUBLISHED}")
    return stated


def _settings(directory: Path) -> Any:
    try:
        return without_panic(PreTrainedTokenizerFast.from_pretrained)(
            directory, local_files_only=True
        )
    except Exception as error:  # whatever transformers makes of odd settings
        raise PreconditionFailed(
            f"the files beside {directory / _FILE} do not fit it ({error}): take "
            f"{', '.join(_BESIDE)} and chat_template.jinja as they were published with the model"
        ) from error


def _warn_of_contradictions(
    directory: Path, stated: Mapping[str, Any], fast: Tokenizer, settings: Any
) -> None:
    """Tell of a prompt's first and last token where tokenizer_config.json wants other ones.

    transformers 5 follows tokenizer.json, and so do we. transformers 4 followed
    tokenizer_config.json for some classes, so an adapter may have been trained that way.
    """
    around = fast.encode("").ids
    for field, token in (
        ("add_bos_token", settings.bos_token),
        ("add_eos_token", settings.eos_token),
    ):
        added = token is not None and fast.token_to_id(token) in around
        if isinstance(stated.get(field), bool) and stated[field] != added:
            log.warning(
                "tokenizer.json and tokenizer_config.json differ: tokenizer.json is followed",
                directory=str(directory),
                field=field,
                token=token,
                added=added,
            )
