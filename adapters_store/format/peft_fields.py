"""The fields of adapter_config.json, each checked as it is read.

Every reader raises InvalidAdapter with the field's name.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from granatum.adapters_store.format.modules import CONFIG_FILE
from granatum.adapters_store.format.pattern import MAX_LENGTH, MAX_PATTERNS
from granatum.adapters_store.names import shown
from granatum.v1.errors import InvalidAdapter

ALL_LINEAR: Final = "all-linear"
_MAX_ALPHA = 1e30  # scales are applied in float32
_MAX_RANK = 1 << 20
"""Above any limit that a server may set."""
_MAX_LAYERS_PATTERNS = 64
_MAX_BASE_MODEL = 256


@dataclass(frozen=True, slots=True)
class Names:
    """A list of module names: a module's whole name, or its end after a dot."""

    names: frozenset[str]

    def matches(self, name: str) -> bool:
        """Whether the module is listed."""
        return not self.names.isdisjoint(suffixes(name))


@dataclass(frozen=True, slots=True)
class Expression:
    """A regular expression for a module's whole name."""

    text: str


def invalid(text: str) -> InvalidAdapter:
    """The error of a bad adapter_config.json."""
    return InvalidAdapter(f"{CONFIG_FILE}: {text}", field=CONFIG_FILE)


def suffixes(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def read_flag(value: object, field: str) -> bool:
    """True or false, not 1 or 0."""
    if not isinstance(value, bool):
        raise invalid(f"{field} must be true or false")
    return value


def read_rank(value: object, field: str) -> int:
    """A rank that some server might serve."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise invalid(f"{field} must be a whole number from 1 to {_MAX_RANK:,}")
    return value


def read_number(value: object, field: str) -> float:
    """A number that can be computed with in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"{field} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _MAX_ALPHA:
        raise invalid(f"{field} must be a finite number, at most {_MAX_ALPHA:g}")
    return number


def read_patterns(fields: Mapping[str, Any], field: str) -> Iterator[tuple[str, object]]:
    """The patterns of `rank_pattern` or `alpha_pattern`, each with its unchecked value."""
    patterns = fields.get(field) or {}
    if not isinstance(patterns, dict):
        raise invalid(f"{field} must be an object of patterns and numbers")
    if len(patterns) > MAX_PATTERNS:
        raise invalid(f"{field} has {len(patterns):,} patterns: give at most {MAX_PATTERNS:,}")
    for text, value in patterns.items():
        yield _pattern(text, field), value


def _pattern(text: str, field: str) -> str:
    if len(text) > MAX_LENGTH:
        raise invalid(
            f"{field}: the pattern {shown(text)} is longer than {MAX_LENGTH:,} characters"
        )
    return text


def _names(value: object, field: str) -> Names:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise invalid(f"{field} must be a list of module names, or a regular expression")
    return Names(frozenset(value))


def read_targets(value: object) -> Names | Expression | Literal["all-linear"] | None:
    """`target_modules`; None: PEFT chooses by the base model's family."""
    if value is None:
        return None
    if isinstance(value, str):
        all_linear = value.lower() == ALL_LINEAR
        return ALL_LINEAR if all_linear else Expression(_pattern(value, "target_modules"))
    return _names(value, "target_modules")


def read_exclude(value: object) -> Names | Expression:
    """`exclude_modules`; no names if the field is absent."""
    if isinstance(value, str) and value:
        return Expression(_pattern(value, "exclude_modules"))
    return _names(value or [], "exclude_modules")


def read_layers(fields: Mapping[str, Any]) -> frozenset[int] | None:
    """`layers_to_transform`; None: all layers."""
    value = fields.get("layers_to_transform")
    if value is None:
        if fields.get("layers_pattern"):
            raise invalid("layers_pattern is given without layers_to_transform: give both")
        return None
    if isinstance(fields.get("target_modules"), str):
        raise invalid("layers_to_transform cannot be used when target_modules is a string")
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise invalid("layers_to_transform must be a layer's number, or a list of them")
    return frozenset(layers) or None


def read_layers_pattern(fields: Mapping[str, Any]) -> frozenset[str]:
    """`layers_pattern`: names of the list of layers; empty: any name."""
    value = fields.get("layers_pattern") or []
    patterns = [value] if isinstance(value, str) else value
    few = isinstance(patterns, list) and len(patterns) <= _MAX_LAYERS_PATTERNS
    if not few or not all(_is_path(pattern) for pattern in patterns):
        raise invalid(
            "layers_pattern must be the name of the list of layers, such as 'layers', or a few"
        )
    return frozenset(patterns)


def read_base_model(fields: Mapping[str, Any]) -> str:
    """`base_model_name_or_path`, with `@revision` if the file names one; empty if it is unknown.

    Of a long path the last 256 characters are kept.
    """
    name, revision = (fields.get(f) or "" for f in ("base_model_name_or_path", "revision"))
    for value, field in ((name, "base_model_name_or_path"), (revision, "revision")):
        if not isinstance(value, str) or not value.isprintable():
            raise invalid(f"{field} must be a text of printable characters: the model's name")
    text = f"{name}@{revision}" if name and revision not in ("", "main") else name
    return text[-_MAX_BASE_MODEL:]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))
