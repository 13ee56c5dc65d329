"""What PEFT's adapter_config.json says: which modules are adapted, with which rank and scale."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from granatum.adapters_store.format.json_text import parse_object
from granatum.adapters_store.format.pattern import (
    MAX_LENGTH,
    MAX_PATTERNS,
    PatternError,
    Question,
    ask,
)
from granatum.adapters_store.format.peft_options import check_options
from granatum.adapters_store.names import shown
from granatum.models.base_model import PARENTS, PROJECTIONS, BaseModel
from granatum.v1.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
_ALL_LINEAR = "all-linear"
_MAX_ALPHA = 1e30  # scales are applied in float32
_MAX_RANK = 1 << 20
"""Above any limit that a server may set."""
_MAX_LAYERS_PATTERNS = 64
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
class Expression:
    """A regular expression for a module's whole name."""

    text: str


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA configuration with PEFT's semantics. `targets` None stands for "all-linear"."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    targets: Names | Expression | None
    exclude: Names | Expression
    layers: frozenset[int] | None
    layers_pattern: frozenset[str]

    @classmethod
    def parse(cls, data: bytes) -> "PeftConfig":
        """Read the file. InvalidAdapter names the field that is wrong or cannot be served."""
        fields = parse_object(data, _not_json)
        check_options(fields)
        return cls(
            rank=_rank(fields.get("r", 8), "r"),
            alpha=_number(fields.get("lora_alpha", 8), "lora_alpha"),
            use_rslora=_flag(fields.get("use_rslora", False), "use_rslora"),
            rank_pattern=tuple(
                (pattern, _rank(value, f"rank_pattern[{shown(pattern)}]"))
                for pattern, value in _patterns(fields, "rank_pattern")
            ),
            alpha_pattern=tuple(
                (pattern, _number(value, f"alpha_pattern[{shown(pattern)}]"))
                for pattern, value in _patterns(fields, "alpha_pattern")
            ),
            targets=_targets(fields.get("target_modules")),
            exclude=_exclude(fields.get("exclude_modules")),
            layers=_layers(fields),
            layers_pattern=_layers_pattern(fields),
        )

    def modules(self, base: BaseModel) -> dict[tuple[int, str], ModuleSpec]:
        """Each adapted (layer, projection), in that order, with its rank and scale. May block.

        Raises InvalidAdapter if nothing of `base` is adapted, or something beside the projections,
        or if a pattern takes too long to match; Unavailable if the machine is too busy to tell.
        """
        places = {
            base.module_name(layer, projection): (layer, projection)
            for layer in range(base.num_layers)
            for projection in PROJECTIONS
        }
        selected = self._selected((*_other_modules(base), *places))
        for name in selected:
            if name not in places:
                raise _invalid(f"target_modules matches {name}, {_ONLY}")
        if not selected:
            raise _invalid(
                "target_modules matches no module of the base model: a list holds names such as "
                "'q_proj', a string is a regular expression for the whole name, such as "
                "'.*[.]q_proj'"
            )
        return {places[name]: spec for name, spec in self._specs(selected).items()}

    def _selected(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The modules that are adapted, in their order."""
        expressions = {
            field: (choice.text,)
            for field, choice in (
                ("target_modules", self.targets),
                ("exclude_modules", self.exclude),
            )
            if isinstance(choice, Expression)
        }
        found = _ask(expressions, names, whole=True)
        included = found.get("target_modules", {})
        excluded = found.get("exclude_modules", {})
        return tuple(
            name
            for name in names
            if not (name in excluded or _is_listed(self.exclude, name))
            and (name in included or self._is_listed_target(name))
        )

    def _is_listed_target(self, name: str) -> bool:
        if self.targets is None:
            return name.rpartition(".")[2] in PROJECTIONS
        if isinstance(self.targets, Expression) or not self.targets.matches(name):
            return False
        # PEFT looks at layers only where a name is matched by its end.
        return name in self.targets.names or self._is_in_layers(name)

    def _is_in_layers(self, name: str) -> bool:
        if self.layers is None:
            return True
        container, _, rest = name.partition(".layers.")
        layer = rest.partition(".")[0]
        known = not self.layers_pattern or not self.layers_pattern.isdisjoint(
            _suffixes(f"{container}.layers")
        )
        return known and layer.isdigit() and int(layer) in self.layers

    def _specs(self, names: tuple[str, ...]) -> dict[str, ModuleSpec]:
        """Each module's rank and scale: by the first pattern that matches, or the general ones."""
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        texts = {field: tuple(text for text, _ in pairs) for field, pairs in patterns.items()}
        found = _ask({field: given for field, given in texts.items() if given}, names, whole=False)
        ranks, alphas = found.get("rank_pattern", {}), found.get("alpha_pattern", {})
        return {
            name: self._spec(
                self.rank_pattern[ranks[name]][1] if name in ranks else self.rank,
                self.alpha_pattern[alphas[name]][1] if name in alphas else self.alpha,
            )
            for name in names
        }

    def _spec(self, rank: int, alpha: float) -> ModuleSpec:
        return ModuleSpec(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))


_ONLY = f"but only {', '.join(PROJECTIONS)} of the decoder layers can be adapted: train without it"


def _invalid(text: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CONFIG_FILE}: {text}", field=CONFIG_FILE)


def _not_json(text: str) -> InvalidAdapter:
    return _invalid(f"{text}: upload what PEFT's save_pretrained wrote")


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


def _is_listed(choice: Names | Expression, name: str) -> bool:
    return isinstance(choice, Names) and choice.matches(name)


def _ask(
    patterns: Mapping[str, tuple[str, ...]], names: tuple[str, ...], *, whole: bool
) -> dict[str, dict[str, int]]:
    """By field, the names that a pattern matches, each with the number of the first."""
    questions = [Question(field, texts, names, whole) for field, texts in patterns.items()]
    try:
        answers = ask(questions)
    except PatternError as error:
        raise _invalid(f"{error.field}: the pattern {shown(error.pattern)} {error}") from error
    return {
        question.field: {
            name: first for name, first in zip(names, answer, strict=True) if first is not None
        }
        for question, answer in zip(questions, answers, strict=True)
    }


def _flag(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        raise _invalid(f"{field} must be true or false")
    return value


def _rank(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise _invalid(f"{field} must be a whole number from 1 to {_MAX_RANK:,}")
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


def _patterns(fields: Mapping[str, Any], field: str) -> Iterator[tuple[str, object]]:
    patterns = fields.get(field) or {}
    if not isinstance(patterns, dict):
        raise _invalid(f"{field} must be an object of patterns and numbers")
    if len(patterns) > MAX_PATTERNS:
        raise _invalid(f"{field} has {len(patterns):,} patterns: give at most {MAX_PATTERNS:,}")
    for text, value in patterns.items():
        yield _pattern(text, field), value


def _pattern(text: str, field: str) -> str:
    if len(text) > MAX_LENGTH:
        raise _invalid(
            f"{field}: the pattern {shown(text)} is longer than {MAX_LENGTH:,} characters"
        )
    return text


def _names(value: object, field: str) -> Names:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _invalid(f"{field} must be a list of module names, or a regular expression")
    return Names(frozenset(value))


def _targets(value: object) -> Names | Expression | None:
    if value is None:
        return _names(_DEFAULT_TARGETS, "target_modules")
    if isinstance(value, str):
        all_linear = value.lower() == _ALL_LINEAR
        return None if all_linear else Expression(_pattern(value, "target_modules"))
    return _names(value, "target_modules")


def _exclude(value: object) -> Names | Expression:
    if isinstance(value, str) and value:
        return Expression(_pattern(value, "exclude_modules"))
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


def _layers_pattern(fields: Mapping[str, Any]) -> frozenset[str]:
    value = fields.get("layers_pattern") or []
    patterns = [value] if isinstance(value, str) else value
    few = isinstance(patterns, list) and len(patterns) <= _MAX_LAYERS_PATTERNS
    if not few or not all(_is_path(pattern) for pattern in patterns):
        raise _invalid(
            "layers_pattern must be the name of the list of layers, such as 'layers', or a few"
        )
    return frozenset(patterns)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))
