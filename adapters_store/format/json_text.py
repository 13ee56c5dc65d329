"""JSON that nobody vouches for."""

import json
from collections.abc import Callable
from typing import Any

from granatum.adapters_store.names import shown
from granatum.v1.errors import InvalidAdapter

_MAX_DEPTH = 64
"""Our files nest far less; recursion can follow far more."""


def parse_object(data: bytes, invalid: Callable[[str], InvalidAdapter]) -> dict[str, Any]:
    """The JSON object in `data`; the error that `invalid` makes of a reason if there is none.

    Names are given once: two readers could otherwise read two different files. Numbers may still be
    as long as the interpreter reads them, NaN or infinite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise invalid(f"names {shown(name)} twice")
            fields[name] = value
        return fields

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise invalid(f"is not JSON{_where(error)}") from error
    if not isinstance(value, dict):
        raise invalid("is not a JSON object")
    if _is_deeper(value, _MAX_DEPTH):
        raise invalid(f"is nested more than {_MAX_DEPTH} levels deep")
    return value


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" ({error.msg} at byte {error.pos:,})"
    return ""


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in inner)
