"""What PEFT's adapter_config.json says: which modules are adapted, with which rank and scale."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from granatum.adapters_store.base_model import PARENTS, PROJECTIONS, BaseModel
from granatum.adapters_store.names import shown
from granatum.adapters_store.pattern import Budget, Pattern, PatternError
from granatum.adapters_store.peft_options import check_options
from granatum.v1.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
_ALL_LINEAR = "all-linear"
_MAX_ALPHA = 1e30  # scales are applied in float32
T = TypeVar("T")
# What PEFT targets in each of our families when target_modules is null.
_DEFAULT_TARGETS = ["q_proj", "v_proj"]


def tensor_name(module: str, matrix: Literal["A", "B"]) -> str:
    """What PEFT's save_pretrained calls a module's `lora_A` or `lora_B`."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """How one projection of one layer is adapted: y += scale · B (A x), A `[rank, in_features]`."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Names:
    """A list of module names: a module's whole name, or its end after a dot."""

    names: frozenset[str]

    def matches(self, name: str) -> bool:
        """Whether the module is listed."""
        return not self.names.isdisjoint(_suffixes(name))


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA configuration with PEFT's semantics. `targets` None stands for "all-linear"."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[Pattern, int], ...]
    alpha_pattern: tuple[tuple[Pattern, float], ...]
    targets: Names | Pattern | None
    exclude: Names | Pattern
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes) -> "PeftConfig":
        """Read the file. InvalidAdapter names the field that is wrong or cannot be served."""
        fields = _object(data)
        check_options(fields)
        return cls(
            rank=_rank(fields.get("r", 8), "r"),
            alpha=_number(fields.get("lora_alpha", 8), "lora_alpha"),
            use_rslora=_flag(fields.get("use_rslora", False), "use_rslora"),
            rank_pattern=tuple(
                (pattern, _rank(value, f"rank_pattern[{shown(pattern.text)}]"))
                for pattern, value in _patterns(fields, "rank_pattern")
            ),
            alpha_pattern=tuple(
                (pattern, _number(value, f"alpha_pattern[{shown(pattern.text)}]"))
                for pattern, value in _patterns(fields, "alpha_pattern")
            ),
            targets=_targets(fields.get("target_modules")),
            exclude=_exclude(fields.get("exclude_modules")),
            layers=_layers(fields),
            layers_pattern=_layers_pattern(fields),
        )

    def modules(self, base: BaseModel) -> dict[tuple[int, str], ModuleSpec]:
        """Each adapted (layer, projection), in that order, with its rank and scale.

        Raises InvalidAdapter if nothing of `base` is adapted, or something beside the projections.
        """
        budget = Budget()
        for name in _other_modules(base):
            if self._is_target(name, budget):
                raise _invalid(f"target_modules matches {name}, {_ONLY}")
        modules = {
            (layer, projection): self._spec(name, budget)
            for layer in range(base.num_layers)
            for projection in PROJECTIONS
            if self._is_target(name := base.module_name(layer, projection), budget)
        }
        if not modules:
            raise _invalid(
                "target_modules matches no module of the base model: a list holds names such as "
                "'q_proj', a string is a regular expression for the whole name, such as "
                "'.*[.]q_proj'"
            )
        return modules

    def _is_target(self, name: str, budget: Budget) -> bool:
        if _selects(self.exclude, name, budget, "exclude_modules"):
            return False
        if self.targets is None:
            return name.rpartition(".")[2] in PROJECTIONS
        if not _selects(self.targets, name, budget, "target_modules"):
            return False
        # PEFT looks at layers only where a name is matched by its end.
        whole = isinstance(self.targets, Pattern) or name in self.targets.names
        return whole or self._is_in_layers(name)

    def _is_in_layers(self, name: str) -> bool:
        if self.layers is None:
            return True
        container, _, rest = name.partition(".layers.")
        layer = rest.partition(".")[0]
        known = not self.layers_pattern or any(
            pattern in _suffixes(f"{container}.layers") for pattern in self.layers_pattern
        )
        return known and layer.isdigit() and int(layer) in self.layers

    def _spec(self, name: str, budget: Budget) -> ModuleSpec:
        rank = _first(self.rank_pattern, name, budget, "rank_pattern", self.rank)
        alpha = _first(self.alpha_pattern, name, budget, "alpha_pattern", self.alpha)
        return ModuleSpec(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))


_ONLY = f"but only {', '.join(PROJECTIONS)} of the decoder layers can be adapted: train without it"


def _invalid(text: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CONFIG_FILE}: {text}")


def _suffixes(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _other_modules(base: BaseModel) -> Iterator[str]:
    """The base model's modules that are no adaptable projection."""
    yield from ("model", "model.embed_tokens", "model.layers", "model.norm", "lm_head")
    for layer in range(base.num_layers):
        prefix = f"model.layers.{layer}"
        yield prefix
        for inner in (*dict.fromkeys(PARENTS.values()), "input_layernorm"):
            yield f"{prefix}.{inner}"
        yield f"{prefix}.post_attention_layernorm"


def _selects(selection: Names | Pattern, name: str, budget: Budget, field: str) -> bool:
    if isinstance(selection, Names):
        return selection.matches(name)
    return _matches(selection, name, [0], budget, field)


def _matches(pattern: Pattern, name: str, starts: list[int], budget: Budget, field: str) -> bool:
    try:
        return pattern.matches(name, starts, budget)
    except PatternError as error:
        raise _invalid(f"{field}: the pattern {shown(pattern.text)} {error}") from error


def _first(
    patterns: tuple[tuple[Pattern, T], ...], name: str, budget: Budget, field: str, default: T
) -> T:
    """The value of the first pattern that matches the name, or its end after a dot."""
    starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
    for pattern, value in patterns:
        if _matches(pattern, name, starts, budget, field):
            return value
    return default


def _object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid(
            f"is not JSON ({error}): upload what PEFT's save_pretrained wrote"
        ) from error
    if not isinstance(fields, dict):
        raise _invalid("is not a JSON object: upload what PEFT's save_pretrained wrote")
    return fields


def _flag(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        raise _invalid(f"{field} must be true or false")
    return value


def _rank(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _invalid(f"{field} must be a whole number from 1 on")
    return value


def _number(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(f"{field} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _MAX_ALPHA:
        raise _invalid(f"{field} must be a finite number, at most {_MAX_ALPHA:g}")
    return number


def _patterns(fields: Mapping[str, Any], field: str) -> Iterator[tuple[Pattern, object]]:
    patterns = fields.get(field) or {}
    if not isinstance(patterns, dict):
        raise _invalid(f"{field} must be an object of patterns and numbers")
    for text, value in patterns.items():
        yield _pattern(text, field), value


def _pattern(text: str, field: str) -> Pattern:
    try:
        return Pattern(text)
    except PatternError as error:
        raise _invalid(f"{field}: the pattern {shown(text)} {error}") from error


def _names(value: object, field: str) -> Names:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _invalid(f"{field} must be a list of module names, or a regular expression")
    return Names(frozenset(value))


def _targets(value: object) -> Names | Pattern | None:
    if value is None:
        return _names(_DEFAULT_TARGETS, "target_modules")
    if isinstance(value, str):
        all_linear = value.lower() == _ALL_LINEAR
        return None if all_linear else _pattern(value, "target_modules")
    return _names(value, "target_modules")


def _exclude(value: object) -> Names | Pattern:
    if isinstance(value, str) and value:
        return _pattern(value, "exclude_modules")
    return _names(value or [], "exclude_modules")


def _layers(fields: Mapping[str, Any]) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    if value is None:
        if fields.get("layers_pattern"):
            raise _invalid("layers_pattern is given without layers_to_transform: give both")
        return None
    if isinstance(fields.get("target_modules"), str):
        raise _invalid("layers_to_transform cannot be used when target_modules is a string")
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise _invalid("layers_to_transform must be a layer's number, or a list of them")
    return frozenset(layers) or None


def _layers_pattern(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("layers_pattern") or []
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(_is_path(pattern) for pattern in patterns):
        raise _invalid("layers_pattern must be the name of the list of layers, such as 'layers'")
    return tuple(patterns)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))
