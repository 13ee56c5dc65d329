"""Python values into a message's fields, with errors that name the field."""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from granatum.v1.errors import InvalidRequest

_KINDS = {
    FieldDescriptor.TYPE_INT32: "a whole number from -2,147,483,648 to 2,147,483,647",
    FieldDescriptor.TYPE_UINT32: "a whole number from 0 to 4,294,967,295",
    FieldDescriptor.TYPE_UINT64: "a whole number from 0 to 18,446,744,073,709,551,615",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_STRING: "text",
}
_HINTS = {
    "max_tokens": "leave it out to fill the context",
    "seed": "leave it out to have one drawn",
    "top_k": "0 keeps all",
}
_ERRORS = (TypeError, ValueError, OverflowError)
_BOOLS = {"bool", "bool_"}
"""The types of Python and numpy; protobuf would take a bool for a number, and a number for it."""
MAX_TIMEOUT_S = 10**9
"""About 30 years. gRPC adds the time of day, and its sum has little room."""
_Filled = TypeVar("_Filled", bound=Message)


def filled(message: _Filled, **fields: object) -> _Filled:
    """The message with these fields set. Raises as `put`."""
    for name, value in fields.items():
        put(message, name, value)
    return message


def put(message: Message, path: str, value: object) -> None:
    """Set a field such as `sampling.top_k`. Raises InvalidRequest for what it cannot carry."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    try:
        if (type(value).__name__ in _BOOLS) != _is_bool(message, name):
            raise TypeError
        setattr(message, name, value)
    except _ERRORS as error:
        raise _wrong(message, name, path, value, error) from None


def extend(message: Message, path: str, values: Sequence[object]) -> None:
    """Add to a repeated field. Raises InvalidRequest for the first value that it cannot carry."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    field = getattr(message, name)
    listed = _listed(values, path)
    try:
        field.extend(listed)
    except _ERRORS:
        for i, value in enumerate(listed):
            try:
                field.append(value)
            except _ERRORS as error:
                raise _wrong(message, name, f"{path}[{i}]", value, error) from None


def put_json(message: Message, path: str, value: object) -> None:
    """Set a field to a value's JSON text. Raises InvalidRequest if JSON has no such value."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        odd = [key for key in _keys(value) if not isinstance(key, str)]
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{path}: JSON cannot hold it ({error}): give dicts, lists, text, finite numbers, "
            "booleans and None",
            field=path,
        ) from None
    if odd:
        raise InvalidRequest(f"{path}: the name {odd[0]!r} is no text: quote it", field=path)
    put(message, path, text)


def seconds(timeout: Any) -> float | None:
    """A timeout as gRPC takes it. Raises InvalidRequest for what is no time."""
    if timeout is None:
        return None
    try:
        given = 0.0 if isinstance(timeout, str | bytes | bool) else float(timeout)
    except _ERRORS:
        given = 0.0
    if not 0 < given <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout: give seconds, above 0 and at most {MAX_TIMEOUT_S:,}, or leave it out; not "
            f"{_shown(timeout)}",
            field="timeout",
        )
    return given


def _is_bool(message: Message, name: str) -> bool:
    return message.DESCRIPTOR.fields_by_name[name].type == FieldDescriptor.TYPE_BOOL


def _listed(values: object, path: str) -> list[Any]:
    listed = as_list(values)
    if listed is None:
        raise InvalidRequest(f"{path}: give a list, not {type(values).__name__}", field=path)
    return listed


def as_list(values: Any) -> list[Any] | None:
    """The values in their order; None for what is no list, or has no order of its own."""
    if isinstance(values, str | bytes | bytearray | Mapping | Set):
        return None
    try:
        return list(values)
    except TypeError:
        return None


def _wrong(
    message: Message, name: str, path: str, value: object, error: Exception
) -> InvalidRequest:
    if isinstance(error, UnicodeEncodeError):
        return InvalidRequest(
            f"{path}: character {error.start} is not Unicode (a lone surrogate, or a byte that is "
            "not UTF-8): send text that UTF-8 can write",
            field=path,
        )
    kind = _KINDS[message.DESCRIPTOR.fields_by_name[name].type]
    hint = f" ({_HINTS[name]})" if name in _HINTS else ""
    return InvalidRequest(f"{path}: give {kind}{hint}, not {_shown(value)}", field=path)


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # Python may refuse to write it
        return "one of that many digits"
    return repr(value) if isinstance(value, int | float) else type(value).__name__


def _keys(value: Any) -> Iterator[Any]:
    """The names in a JSON value, of all its depths."""
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for child in value:
            yield from _keys(child)
