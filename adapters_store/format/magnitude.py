"""Whether an adapter's numbers are small enough for a model to compute with them.

A module adds scale · B (A x). With the largest element of each matrix, a, b, and K inputs, no
element of A x exceeds a · √K · |x| (Cauchy and Schwarz), and no element of B (A x) exceeds rank · b
times that. Sums are float32, values are rounded to bfloat16, and both end near 3.4e38. What a
module adds is soon squared: by the next norm, by attention, by the gate of the MLP. So the sum must
stay below the square root of 3.4e38, and A x below 3.4e38 itself.

|x| is not known here. Norms keep the inputs of most modules near √K; the largest activations that
models are known for are some thousands. 2^20 is far above both. A trained adapter stays below the
bound by ten orders of magnitude or more; one beyond it makes infinities.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from granatum.adapters_store.format.modules import Modules, ModuleSpec, tensor_name
from granatum.adapters_store.format.safetensors_file import TensorEntry, invalid_weights, read_parts
from granatum.models.base_model import BaseModel

INPUT_NORM = 2.0**20
"""More than the Euclidean norm of any module's input."""
LARGEST = 2.0**127 * (2 - 2.0**-7)
"""The largest bfloat16; the largest float32 is a little above."""
_LARGEST_SUM = math.sqrt(LARGEST)


def check_magnitudes(
    weights: Path,
    entries: Mapping[str, TensorEntry],
    modules: Modules,
    base: BaseModel,
) -> None:
    """Raise InvalidAdapter for a tensor that would make a sum infinite.

    The file is read in parts, so memory is bounded. This check does not look for NaN and
    infinities: `validate` finds them, and the packing of an image does too.
    """
    with weights.open("rb") as file:
        for place, spec in modules.items():
            module = base.module_name(*place)
            a, b = (entries[tensor_name(module, matrix)] for matrix in ("A", "B"))
            _check(a, _largest(file, a), b, _largest(file, b), spec)


def _check(
    a: TensorEntry, largest_a: float, b: TensorEntry, largest_b: float, spec: ModuleSpec
) -> None:
    inputs = a.shape[1]
    between = largest_a * math.sqrt(inputs) * INPUT_NORM * max(1.0, abs(spec.scale))
    if between > LARGEST:
        raise _too_large(a, largest_a, f"with scale {spec.scale:g} its products overflow")
    if largest_b > LARGEST:
        raise _too_large(b, largest_b, "it is infinite in bfloat16")
    added = abs(spec.scale) * largest_a * math.sqrt(inputs) * INPUT_NORM * spec.rank * largest_b
    if added > _LARGEST_SUM:
        raise _too_large(
            b,
            largest_b,
            f"with {largest_a:g} in {a.name} and scale {spec.scale:g} its products overflow",
        )


def _too_large(entry: TensorEntry, largest: float, reason: str) -> Exception:
    return invalid_weights(
        f"tensor {entry.name} holds {largest:g}, which the model cannot compute with: {reason}: "
        "did the training diverge?"
    )


def _largest(file: BinaryIO, entry: TensorEntry) -> float:
    """The largest absolute element."""
    parts = (_numbers(data, entry.dtype) for _, data in read_parts(file, entry))
    return max((float(np.abs(part).max()) for part in parts), default=0.0)


def _numbers(data: bytes, dtype: str) -> npt.NDArray[np.floating]:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype])
