"""An adapter's page images: its matrices as they will lie on the device. No torch.

This is the runner's border: PEFT's two files come from a store and may have faults. An adapter that
is packed fits this runner's ranks and pages, and its numbers are finite in the model's dtype.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from granatum.adapters_store.format.magnitude import check_magnitudes
from granatum.adapters_store.format.modules import (
    CONFIG_FILE,
    Modules,
    ModuleSpec,
    by_projection,
    tensor_name,
)
from granatum.adapters_store.format.peft_config import PeftConfig
from granatum.adapters_store.format.safetensors_file import WEIGHTS_FILE, TensorEntry
from granatum.adapters_store.format.tensors import read_tensors
from granatum.adapters_store.limits import DEFAULT_LIMITS, padded_rank
from granatum.models.base_model import BaseModel
from granatum.models.families import Module
from granatum.runner.adapters.images.layout import AdapterLayout, Place, TableRow, lay_out
from granatum.v1.errors import InvalidAdapter

FORMAT = 2
"""The version of the image files (file.py) and of the layout within them."""
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
}
"""How numpy holds each dtype of a model. It has no bfloat16: the bits are held as integers."""
_FILED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_EXPONENT = np.uint16(0x7F80)
"""A bfloat16 is not finite if all of these bits are set."""

Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ImageShape:
    """What images of one runner have in common. Only images of an equal `key` fit its arena.

    `dtype` is `float32` or `bfloat16`, with or without `torch.` before it. `max_rank` is not part
    of the key: runners that differ in `max_rank` alone can share images.
    """

    base: BaseModel
    dtype: str
    page_elements: int
    max_rank: int = DEFAULT_LIMITS.max_rank

    def __post_init__(self) -> None:
        """Cut torch's name off the dtype."""
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        assert self.dtype in _STORED, f"no model computes in {self.dtype}"

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of the numpy arrays that hold elements."""
        return _STORED[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_elements * self.stored.itemsize

    @property
    def key(self) -> bytes:
        """32 bytes that no other shape has."""
        parts = [FORMAT, self.base.fingerprint, self.dtype, self.page_elements]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter in memory: `pages` `[pages, page_elements]` and its table row."""

    pages: Numbers
    row: TableRow


def build_image(directory: Path, shape: ImageShape) -> AdapterImage:
    """Pack PEFT's two files. Raises InvalidAdapter if this runner cannot serve them."""
    config = PeftConfig.parse((directory / CONFIG_FILE).read_bytes())
    modules = config.modules(shape.base)
    for place, spec in modules.items():
        check_rank(spec.rank, shape, shape.base.module_name(*place))
    weights = _Weights(directory / WEIGHTS_FILE, shape)
    layout = lay_out(shape.base, modules, shape.page_elements)
    pages = np.zeros((layout.pages, shape.page_elements), shape.stored)
    projections = by_projection(modules, shape.base)
    for placed in layout.places:
        _fill(_view(pages, placed), weights, projections, placed)
    check_magnitudes(directory / WEIGHTS_FILE, weights.entries, modules, shape.base)
    return AdapterImage(pages, layout.row)


def check_rank(rank: int, shape: ImageShape, what: str) -> None:
    """Raise InvalidAdapter if the rank is above this runner's limit; `what` names the module."""
    if rank > shape.max_rank:
        raise InvalidAdapter(
            f"rank {rank} of {what} is above this runner's limit of {shape.max_rank}: train with "
            "a lower rank, or start the runner with a higher --max-rank",
            reason="ADAPTER_RANK_TOO_HIGH",
        )


def random_image(shape: ImageShape, rank: int, seed: int) -> AdapterImage:
    """A random adapter of `rank` on every module, for measurements without files."""
    modules = {
        (layer, name): ModuleSpec(rank, 1.0)
        for layer in range(shape.base.num_layers)
        for name in shape.base.modules
    }
    layout = lay_out(shape.base, modules, shape.page_elements)
    return AdapterImage(_random_pages(layout, shape, seed), layout.row)


class _Weights:
    """The tensors of a safetensors file, in the model's dtype."""

    def __init__(self, path: Path, shape: ImageShape) -> None:
        self.base = shape.base
        self._path = path
        self._dtype = shape.dtype
        self.entries = read_tensors(path, DEFAULT_LIMITS)

    def a(self, layer: int, projection: str, rank: int) -> Numbers:
        """The A `[rank, in_features]` of the projection's module. Raises InvalidAdapter."""
        module = self.base.module_of(projection)
        expected = rank, self.base.features[projection][0]
        return self._rows(self._name(layer, module, "A"), expected, 0, rank)

    def b(self, layer: int, projection: str, rank: int) -> Numbers:
        """The projection's rows `[out_features, rank]` of its module's B. Raises InvalidAdapter."""
        module = self.base.module_of(projection)
        widths = {name: self.base.features[name][1] for name in module.projections}
        first = sum(list(widths.values())[: module.projections.index(projection)])
        expected = sum(widths.values()), rank
        return self._rows(self._name(layer, module, "B"), expected, first, widths[projection])

    def _name(self, layer: int, module: Module, matrix: Literal["A", "B"]) -> str:
        return tensor_name(self.base.module_name(layer, module.name), matrix)

    def _rows(self, name: str, expected: tuple[int, int], first: int, count: int) -> Numbers:
        """`count` rows from `first` on of a tensor that has the `expected` shape."""
        entry = self.entries.get(name)
        if entry is None or entry.shape != expected:
            found = "missing" if entry is None else f"of shape {list(entry.shape)}"
            raise _unpackable(f"tensor {name} is {found} and {CONFIG_FILE} asks for {[*expected]}")
        filed, columns = _FILED[entry.dtype], expected[1]
        offset = entry.begin + first * columns * filed.itemsize
        numbers = np.fromfile(self._path, filed, count * columns, offset=offset)
        if numbers.size != count * columns:
            raise _unpackable(f"tensor {name} was cut off")
        return self._converted(numbers, entry).reshape(count, columns)

    def _converted(self, numbers: Numbers, entry: TensorEntry) -> Numbers:
        """The numbers in the model's dtype, rounded as torch does. Raises if one is not finite."""
        with np.errstate(over="ignore"):
            wide: Numbers = (
                _widened(numbers) if entry.dtype == "BF16" else numbers.astype(np.float32)
            )
        found: Numbers = _narrowed(wide) if self._dtype == "bfloat16" else wide
        if not np.isfinite(wide).all() or (
            self._dtype == "bfloat16" and ((found & _EXPONENT) == _EXPONENT).any()
        ):
            raise _unpackable(
                f"tensor {entry.name} holds numbers that are not finite in this runner's "
                f"{self._dtype}"
            )
        return found


def _unpackable(text: str) -> InvalidAdapter:
    return InvalidAdapter(f"{WEIGHTS_FILE} cannot be packed: {text}: train and upload it again")


def _widened(numbers: Numbers) -> Numbers:
    """bfloat16 to float32: a bfloat16 is the upper half of a float32."""
    return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrowed(numbers: Numbers) -> Numbers:
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def _fill(matrix: Numbers, weights: _Weights, projections: Modules, place: Place) -> None:
    """Copy a piece's tensors into its place. Rows beyond the true ranks stay zero."""
    layer, family = place.piece.layer, weights.base.family
    if place.piece.projection is not None:
        name = family.projections[place.piece.projection]
        rank = projections[layer, name].rank
        matrix[:rank] = weights.b(layer, name, rank).T
        return
    assert place.piece.group is not None
    start = 0
    for name in family.groups[place.piece.group].projections:
        if (layer, name) in projections:
            rank = projections[layer, name].rank
            matrix[start : start + rank] = weights.a(layer, name, rank)
            start += padded_rank(rank)


def _view(pages: Numbers, place: Place) -> Numbers:
    """The piece's matrix `[rows, columns]` within the pages."""
    rows, columns = place.piece.rows, place.piece.columns
    numbers = pages[place.page, place.offset : place.offset + rows * columns]
    return numbers.reshape(rows, columns)


def _random_pages(layout: AdapterLayout, shape: ImageShape, seed: int) -> Numbers:
    generator = np.random.default_rng(seed)
    pages = np.empty((layout.pages, shape.page_elements), shape.stored)
    for page in pages:
        wide = generator.random(shape.page_elements, np.float32) * 0.08 - 0.04
        page[:] = _narrowed(wide) if shape.dtype == "bfloat16" else wide
    return pages
