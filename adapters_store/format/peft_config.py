"""What PEFT's adapter_config.json says: which modules are adapted, with which rank and scale."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from granatum.adapters_store.format.json_text import parse_object
from granatum.adapters_store.format.modules import ModuleSpec
from granatum.adapters_store.format.pattern import PatternError, Question, ask
from granatum.adapters_store.format.peft_fields import (
    ALL_LINEAR,
    Expression,
    Names,
    invalid,
    read_base_model,
    read_exclude,
    read_flag,
    read_layers,
    read_layers_pattern,
    read_number,
    read_patterns,
    read_rank,
    read_targets,
    suffixes,
)
from granatum.adapters_store.format.peft_options import check_options
from granatum.adapters_store.names import shown
from granatum.models.base_model import BaseModel
from granatum.v1.errors import InvalidAdapter


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA configuration with PEFT's semantics.

    `targets` is None if the file leaves the choice to PEFT, which knows targets of some families.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    targets: Names | Expression | Literal["all-linear"] | None
    exclude: Names | Expression
    layers: frozenset[int] | None
    layers_pattern: frozenset[str]
    base_model: str
    """The base model that it was trained for, as the trainer called it; empty if unknown."""

    @classmethod
    def parse(cls, data: bytes) -> "PeftConfig":
        """Read the file. InvalidAdapter names the field that is wrong or cannot be served."""
        fields = parse_object(data, _not_json)
        check_options(fields)
        return cls(
            rank=read_rank(fields.get("r", 8), "r"),
            alpha=read_number(fields.get("lora_alpha", 8), "lora_alpha"),
            use_rslora=read_flag(fields.get("use_rslora") or False, "use_rslora"),
            rank_pattern=tuple(
                (pattern, read_rank(value, f"rank_pattern[{shown(pattern)}]"))
                for pattern, value in read_patterns(fields, "rank_pattern")
            ),
            alpha_pattern=tuple(
                (pattern, read_number(value, f"alpha_pattern[{shown(pattern)}]"))
                for pattern, value in read_patterns(fields, "alpha_pattern")
            ),
            targets=read_targets(fields.get("target_modules")),
            exclude=read_exclude(fields.get("exclude_modules")),
            layers=read_layers(fields),
            layers_pattern=read_layers_pattern(fields),
            base_model=read_base_model(fields),
        )

    def modules(self, base: BaseModel) -> dict[tuple[int, str], ModuleSpec]:
        """Each adapted (layer, module's name), in that order, with its rank and scale. May block.

        Raises InvalidAdapter if nothing of `base` is adapted, or something that cannot be, or if a
        pattern takes too long to match; Unavailable if the machine is too busy to tell.
        """
        places = {
            base.module_name(layer, module): (layer, module)
            for layer in range(base.num_layers)
            for module in base.modules
        }
        selected = self._selected((*_other_modules(base), *places), self._targets_of(base))
        for name in selected:
            if name not in places:
                raise invalid(
                    f"target_modules matches {name}, but only {', '.join(base.modules)} of the "
                    "decoder layers can be adapted: train without it"
                )
        if not selected:
            example = next(iter(base.modules))
            raise invalid(
                "target_modules matches no module of the base model: a list holds names such as "
                f"'{example}', a string is a regular expression for the whole name, such as "
                f"'.*[.]{example}'"
            )
        return {places[name]: spec for name, spec in self._specs(selected).items()}

    def _targets_of(self, base: BaseModel) -> Names | Expression:
        """The choice of modules, once the base model is known."""
        if self.targets == ALL_LINEAR:
            return Names(frozenset(base.modules))
        if self.targets is not None:
            return self.targets
        if not base.family.default_targets:
            raise invalid(
                f"target_modules is null, and PEFT knows no targets of {base.family.model_type} "
                f"models: name some of {', '.join(base.modules)}"
            )
        return Names(frozenset(base.family.default_targets))

    def _selected(self, names: tuple[str, ...], targets: Names | Expression) -> tuple[str, ...]:
        """The modules that are adapted, in their order."""
        expressions = {
            field: (choice.text,)
            for field, choice in (("target_modules", targets), ("exclude_modules", self.exclude))
            if isinstance(choice, Expression)
        }
        found = _ask(expressions, names, whole=True)
        included = found.get("target_modules", {})
        excluded = found.get("exclude_modules", {})
        return tuple(
            name
            for name in names
            if not (name in excluded or _is_listed(self.exclude, name))
            and (name in included or self._is_listed_target(name, targets))
        )

    def _is_listed_target(self, name: str, targets: Names | Expression) -> bool:
        if isinstance(targets, Expression) or not targets.matches(name):
            return False
        # PEFT looks at layers only where a name is matched by its end.
        return name in targets.names or self._is_in_layers(name)

    def _is_in_layers(self, name: str) -> bool:
        if self.layers is None:
            return True
        container, _, rest = name.partition(".layers.")
        layer = rest.partition(".")[0]
        known = not self.layers_pattern or not self.layers_pattern.isdisjoint(
            suffixes(f"{container}.layers")
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


def _not_json(text: str) -> InvalidAdapter:
    return invalid(f"{text}: upload what PEFT's save_pretrained wrote")


def _other_modules(base: BaseModel) -> Iterator[str]:
    """The base model's modules that cannot be adapted."""
    yield from ("model", "model.embed_tokens", "model.layers", "model.norm", "lm_head")
    for layer in range(base.num_layers):
        prefix = f"model.layers.{layer}"
        yield prefix
        parents = dict.fromkeys(module.parent for module in base.modules.values())
        for inner in (*parents, "input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{inner}"


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
        raise invalid(f"{error.field}: the pattern {shown(error.pattern)} {error}") from error
    return {
        question.field: {
            name: first for name, first in zip(names, answer, strict=True) if first is not None
        }
        for question, answer in zip(questions, answers, strict=True)
    }
