"""Whether an adapter can be served on the base model. Blocks: run it in a thread."""

import re
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
    read_header,
    read_parts,
)
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
_HINTS = (
    (re.compile(r"[/\\]|\.\."), "its name looks like a path"),
    (re.compile(r"lora_magnitude"), "it belongs to DoRA, which cannot be served"),
    (re.compile(r"lora_embedding"), "embeddings cannot be adapted"),
    (re.compile(r"lora_[AB]\.bias$"), "biases of LoRA's own matrices are not applied"),
    (
        re.compile(r"lora_[AB]\.[^.]+\.weight$"),
        "its name contains that of the adapter: save it with PEFT's save_pretrained",
    ),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the catalog says of an adapter. `elements`: numbers that it takes in an arena."""

    max_rank: int
    target_modules: tuple[str, ...]
    elements: int


def validate(
    config: Path, weights: Path, base: BaseModel, limits: UploadLimits, fleet: FleetLimits = ()
) -> Summary:
    """Check both files against each other and the base model, down to the last number.

    At least one runner of the fleet must be able to serve the adapter. Memory stays bounded,
    however large the files are. Raises InvalidAdapter for the first fault.
    """
    modules = PeftConfig.parse(config.read_bytes()).modules(base)
    _check_ranks(modules, base, limits)
    elements = _elements(modules, base)
    _check_fleet(modules, elements, base, fleet)
    entries = read_header(weights, limits)
    _check_pairs(entries, modules, base)
    _check_nothing_else(entries, modules, base)
    _check_shapes(entries, modules, base)
    _check_finite(weights, entries)
    check_magnitudes(weights, entries, modules, base)
    return Summary(
        max_rank=max(spec.rank for spec in modules.values()),
        target_modules=tuple(sorted({module for _, module in modules})),
        elements=elements,
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
    known = set(_tensor_names(modules, base))
    for name in entries:
        if name not in known:
            raise invalid_weights(f"tensor {shown(name)} would not be applied: {_why(name, base)}")


def _tensor_names(modules: Modules, base: BaseModel) -> Iterator[str]:
    for place in modules:
        module = base.module_name(*place)
        yield tensor_name(module, "A")
        yield tensor_name(module, "B")


def _why(name: str, base: BaseModel) -> str:
    for pattern, hint in _HINTS:
        if pattern.search(name):
            return hint
    at = re.fullmatch(r"base_model\.model\.model\.layers\.(\d{1,6})\.(.+)\.lora_[AB]\.weight", name)
    if at is None:
        return "PEFT names an adapter's tensors " + tensor_name("model.layers.<n>...", "A")
    if int(at[1]) >= base.num_layers:
        return f"the base model {base.name} has {base.num_layers} layers"
    if at[2] not in {module.path for module in base.modules.values()}:
        return f"only {', '.join(base.modules)} can be adapted"
    return f"{CONFIG_FILE} does not target its module"


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
