"""Python values into a message's fields, with errors that name the field."""

import json
from collections.abc import Iterator, Mapping, Sequence
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
        if isinstance(value, bool) and not _is_bool(message, name):
            raise TypeError
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise _wrong(message, name, path, value, error) from None


def extend(message: Message, path: str, values: Sequence[object]) -> None:
    """Add to a repeated field. Raises InvalidRequest for the first value that it cannot carry."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    field = getattr(message, name)
    try:
        field.extend(values)
    except (TypeError, ValueError):
        for i, value in enumerate(_iterated(values, path)):
            try:
                field.append(value)
            except (TypeError, ValueError) as error:
                raise _wrong(message, name, f"{path}[{i}]", value, error) from None


def put_json(message: Message, path: str, value: object) -> None:
    """Set a field to a value's JSON text. Raises InvalidRequest if JSON has no such value."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{path}: JSON cannot hold it ({error}): give dicts, lists, text, finite numbers, "
            "booleans and None",
            field=path,
        ) from None
    for key in _keys(value):
        if not isinstance(key, str):
            raise InvalidRequest(f"{path}: the name {key!r} is no text: quote it", field=path)
    put(message, path, text)


def _is_bool(message: Message, name: str) -> bool:
    return message.DESCRIPTOR.fields_by_name[name].type == FieldDescriptor.TYPE_BOOL


def _iterated(values: Sequence[object], path: str) -> Iterator[object]:
    try:
        return iter(values)
    except TypeError:
        raise InvalidRequest(
            f"{path}: give a list, not {type(values).__name__}", field=path
        ) from None


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
    shown = repr(value)[:40] if isinstance(value, int | float) else type(value).__name__
    return InvalidRequest(f"{path}: give {kind}{hint}, not {shown}", field=path)


def _keys(value: Any) -> Iterator[Any]:
    """The names in a JSON value, of all its depths."""
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for child in value:
            yield from _keys(child)
