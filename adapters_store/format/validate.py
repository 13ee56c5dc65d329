"""Whether an adapter can be served on the base model. Blocks: run it in a thread."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from granatum.adapters_store.format.magnitude import check_magnitudes
from granatum.adapters_store.format.modules import (
    CONFIG_FILE,
    Modules,
    by_projection,
    tensor_name,
)
from granatum.adapters_store.format.peft_config import PeftConfig
from granatum.adapters_store.format.safetensors_file import (
    TensorEntry,
    invalid_weights,
    read_parts,
)
from granatum.adapters_store.format.tensors import read_tensors, why_unknown
from granatum.adapters_store.format.trained_for import check_trained_for
from granatum.adapters_store.limits import FleetLimits, UploadLimits, padded_rank
from granatum.adapters_store.names import shown
from granatum.models.base_model import BaseModel
from granatum.v1.errors import InvalidAdapter

# A float is NaN or infinite if every bit of its exponent is set.
_EXPONENTS = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True, slots=True)
class Summary:
    """What the catalog says of an adapter. `elements`: numbers that it takes in an arena."""

    max_rank: int
    target_modules: tuple[str, ...]
    elements: int
    base_model: str


def validate(
    config: Path,
    weights: Path,
    base: BaseModel,
    limits: UploadLimits,
    fleet: FleetLimits = (),
    asked_for: str = "",
) -> Summary:
    """Check both files against each other and the base model, down to the last number.

    At least one runner of the fleet must be able to serve the adapter. `asked_for`: the base model
    that the upload names. Memory stays bounded, however large the files are. Raises InvalidAdapter
    for the first fault.
    """
    parsed = PeftConfig.parse(config.read_bytes())
    check_trained_for(parsed.base_model, base, asked_for)
    modules = parsed.modules(base)
    _check_ranks(modules, base, limits)
    elements = _elements(modules, base)
    _check_fleet(modules, elements, base, fleet)
    entries = read_tensors(weights, limits)
    _check_nothing_else(entries, modules, base)
    _check_pairs(entries, modules, base)
    _check_shapes(entries, modules, base)
    _check_finite(weights, entries)
    check_magnitudes(weights, entries, modules, base)
    return Summary(
        max_rank=max(spec.rank for spec in modules.values()),
        target_modules=tuple(sorted({module for _, module in modules})),
        elements=elements,
        base_model=parsed.base_model,
    )


def _elements(modules: Modules, base: BaseModel) -> int:
    """Numbers that the adapter takes in a runner's arena, where each rank is rounded up."""
    return sum(
        padded_rank(spec.rank) * sum(base.features[projection])
        for (_, projection), spec in by_projection(modules, base).items()
    )


def _check_fleet(modules: Modules, elements: int, base: BaseModel, fleet: FleetLimits) -> None:
    place, spec = max(modules.items(), key=lambda item: item[1].rank)
    wide_enough = [runner for runner in fleet if runner.has_rank(spec.rank)]
    if fleet and not wide_enough:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: rank {spec.rank} of {base.module_name(*place)} is above "
            f"{max(runner.max_rank for runner in fleet)}, the highest that a runner here serves: "
            "train with a lower one, or have a runner started with a higher --max-rank",
            field=CONFIG_FILE,
        )
    if fleet and not any(runner.has_elements(elements) for runner in wide_enough):
        raise InvalidAdapter(
            f"{CONFIG_FILE}: the adapter takes room for {elements:,} numbers, more than the "
            f"{max(runner.max_elements for runner in wide_enough):,} that a runner here has room "
            "for: train fewer modules or a lower rank",
            field=CONFIG_FILE,
        )


def _check_ranks(modules: Modules, base: BaseModel, limits: UploadLimits) -> None:
    for place, spec in modules.items():
        if spec.rank > limits.max_rank:
            raise InvalidAdapter(
                f"{CONFIG_FILE}: rank {spec.rank} of {base.module_name(*place)} "
                f"is above the limit of {limits.max_rank}: train with a lower one",
                field=CONFIG_FILE,
            )


def _check_pairs(entries: Mapping[str, TensorEntry], modules: Modules, base: BaseModel) -> None:
    for place in modules:
        module = base.module_name(*place)
        a, b = tensor_name(module, "A"), tensor_name(module, "B")
        if a not in entries and b not in entries:
            raise invalid_weights(
                f"{CONFIG_FILE} targets {module}, but its tensors {a} and {b} are missing"
            )
        for present, missing in ((a, b), (b, a)):
            if missing not in entries:
                raise invalid_weights(f"tensor {missing} is missing, though {present} is there")


def _check_nothing_else(
    entries: Mapping[str, TensorEntry], modules: Modules, base: BaseModel
) -> None:
    known = dict.fromkeys(_tensor_names(modules, base))
    for name, entry in entries.items():
        if name not in known:
            expected = next((name for name in known if name not in entries), next(iter(known)))
            raise invalid_weights(
                f"tensor {shown(entry.name)} would not be applied: {why_unknown(name, base)}; "
                f"a name that is expected: {expected}"
            )


def _tensor_names(modules: Modules, base: BaseModel) -> Iterator[str]:
    for place in modules:
        module = base.module_name(*place)
        yield tensor_name(module, "A")
        yield tensor_name(module, "B")


def _check_shapes(entries: Mapping[str, TensorEntry], modules: Modules, base: BaseModel) -> None:
    for (layer, module), spec in modules.items():
        name, (inputs, outputs) = base.module_name(layer, module), base.module_features(module)
        _check_shape(entries[tensor_name(name, "A")], (spec.rank, inputs), 0)
        _check_shape(entries[tensor_name(name, "B")], (outputs, spec.rank), 1)


def _check_shape(entry: TensorEntry, expected: tuple[int, int], rank_at: int) -> None:
    """Refuse another shape; `rank_at` is the index of the rank in it."""
    if entry.shape == expected:
        return
    reason = (
        f"{CONFIG_FILE} gives its module rank {expected[rank_at]}"
        if len(entry.shape) == 2 and entry.shape[1 - rank_at] == expected[1 - rank_at]
        else "is the adapter for another base model?"
    )
    raise invalid_weights(
        f"tensor {entry.name} has shape {list(entry.shape)}, not {list(expected)}: {reason}"
    )


def _check_finite(weights: Path, entries: Mapping[str, TensorEntry]) -> None:
    with weights.open("rb") as file:
        for entry in sorted(entries.values(), key=lambda entry: entry.begin):
            element = _first_not_finite(file, entry)
            if element is not None:
                raise invalid_weights(
                    f"tensor {entry.name}: element {element} is NaN or infinite: "
                    "the training diverged"
                )


def _first_not_finite(file: BinaryIO, entry: TensorEntry) -> int | None:
    word, exponent = _EXPONENTS[entry.dtype]
    for begin, data in read_parts(file, entry):
        words: npt.NDArray[np.unsignedinteger] = np.frombuffer(data, word)
        bad = np.flatnonzero((words & exponent) == exponent)
        if bad.size:
            return (begin - entry.begin) // words.itemsize + int(bad[0])
    return None
