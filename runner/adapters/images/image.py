"""An adapter's page images: its matrices as they will lie on the device. No torch.

PEFT's two files come from a store, and so do their faults. Here is the runner's border: what is
packed fits this runner's ranks and pages, and every number in it is finite in the model's dtype.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from granatum.adapters_store.format.magnitude import check_magnitudes
from granatum.adapters_store.format.peft_config import (
    CONFIG_FILE,
    ModuleSpec,
    PeftConfig,
    tensor_name,
)
from granatum.adapters_store.format.safetensors_file import WEIGHTS_FILE, TensorEntry, read_header
from granatum.adapters_store.limits import DEFAULT_LIMITS, RANK_STEP
from granatum.models.base_model import GROUPS, PROJECTIONS, BaseModel
from granatum.runner.adapters.images.layout import (
    AdapterLayout,
    Place,
    TableRow,
    lay_out,
    padded,
)
from granatum.v1.errors import InvalidAdapter

FORMAT = 2
"""Of the files (adapter_file.py) and of the layout within them."""
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
}
"""How numpy holds each dtype of a model; it has no bfloat16, whose bits it takes for an integer."""
_FILED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_EXPONENT = np.uint16(0x7F80)
"""All of these bits are set in a bfloat16 that is not finite."""

Numbers = npt.NDArray[Any]
Modules = Mapping[tuple[int, str], ModuleSpec]


@dataclass(frozen=True, slots=True)
class ImageShape:
    """What images of one runner have in common: only those of an equal key fit its arena.

    `dtype` is `float32` or `bfloat16`, with or without torch's name before it. `max_rank` is not
    part of the key: runners that differ in it alone can share images.
    """

    base: BaseModel
    dtype: str
    page_elements: int
    max_rank: int = DEFAULT_LIMITS.max_rank

    def __post_init__(self) -> None:
        """Take torch's own name of the dtype, too."""
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        assert self.dtype in _STORED, f"no model computes in {self.dtype}"

    @property
    def stored(self) -> np.dtype[Any]:
        """What numpy takes an element for."""
        return _STORED[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return self.page_elements * self.stored.itemsize

    @property
    def key(self) -> bytes:
        """32 bytes that differ for every other shape."""
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
    for (layer, projection), spec in modules.items():
        check_rank(spec.rank, shape, shape.base.module_name(layer, projection))
    weights = _Weights(directory / WEIGHTS_FILE, shape)
    layout = lay_out(shape.base, modules, shape.page_elements)
    pages = np.zeros((layout.pages, shape.page_elements), shape.stored)
    for place in layout.places:
        _fill(_view(pages, place), weights, modules, place)
    check_magnitudes(directory / WEIGHTS_FILE, weights.entries, modules, shape.base)
    return AdapterImage(pages, layout.row)


def check_rank(rank: int, shape: ImageShape, what: str) -> None:
    """Refuse what the kernels of this runner have no room for."""
    if rank > shape.max_rank:
        raise InvalidAdapter(
            f"rank {rank} of {what} is above this runner's limit of {shape.max_rank}: train with "
            "a lower rank, or start the runner with a higher --max-rank",
            reason="ADAPTER_RANK_TOO_HIGH",
        )


def random_image(shape: ImageShape, rank: int, seed: int) -> AdapterImage:
    """A random adapter of `rank` on every projection, for measurements without files."""
    modules = {
        (layer, name): ModuleSpec(rank, 1.0)
        for layer in range(shape.base.num_layers)
        for name in PROJECTIONS
    }
    layout = lay_out(shape.base, modules, shape.page_elements)
    return AdapterImage(_random_pages(layout, shape, seed), layout.row)


class _Weights:
    """The tensors of a safetensors file, as the model's dtype has them."""

    def __init__(self, path: Path, shape: ImageShape) -> None:
        self.base = shape.base
        self._path = path
        self._dtype = shape.dtype
        self.entries = read_header(path, DEFAULT_LIMITS)

    def tensor(self, name: str, expected: tuple[int, int]) -> Numbers:
        """A matrix of the `expected` sizes. Raises InvalidAdapter."""
        entry = self.entries.get(name)
        if entry is None or entry.shape != expected:
            found = "missing" if entry is None else f"of shape {list(entry.shape)}"
            raise _unpackable(f"tensor {name} is {found} and {CONFIG_FILE} asks for {[*expected]}")
        filed = _FILED[entry.dtype]
        count = (entry.end - entry.begin) // filed.itemsize
        numbers = np.fromfile(self._path, filed, count, offset=entry.begin)
        if numbers.size != count:
            raise _unpackable(f"tensor {name} was cut off")
        return self._converted(numbers, entry).reshape(expected)

    def _converted(self, numbers: Numbers, entry: TensorEntry) -> Numbers:
        """In the model's dtype, rounded to the nearest as torch does; all of them finite."""
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
    """A bfloat16 is the upper half of a float32."""
    return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrowed(numbers: Numbers) -> Numbers:
    """The bfloat16 next to each float32, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def _fill(matrix: Numbers, weights: _Weights, modules: Modules, place: Place) -> None:
    """Copy a piece's tensors into its place, where everything beyond the true ranks stays zero."""
    piece, base = place.piece, weights.base
    if piece.projection is not None:
        name = PROJECTIONS[piece.projection]
        rank, outputs = modules[piece.layer, name].rank, base.features[name][1]
        module = base.module_name(piece.layer, name)
        matrix[:rank] = weights.tensor(tensor_name(module, "B"), (outputs, rank)).T
        return
    assert piece.group is not None
    start = 0
    for name in list(GROUPS.values())[piece.group]:
        if (piece.layer, name) not in modules:
            continue
        rank, inputs = modules[piece.layer, name].rank, base.features[name][0]
        module = base.module_name(piece.layer, name)
        matrix[start : start + rank] = weights.tensor(tensor_name(module, "A"), (rank, inputs))
        start += padded(rank, RANK_STEP)


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
