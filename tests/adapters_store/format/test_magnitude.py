"""What a model cannot compute with is refused by the tensor's name; what it can is not."""

from typing import Any

import numpy as np
import pytest
from adapter_files import Tensor, config, tensors, upload, weights
from uploading import BASE, SHAPE, send

from granatum.adapters_store.store import AdapterStore
from granatum.v1.errors import InvalidAdapter

RANK = 4


def _filled(value: float, count: int, dtype: str) -> bytes:
    numbers = np.full(count, value, np.float32)
    if dtype == "BF16":
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    return numbers.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def _adapter(
    a: float, b: float, target: str = "down_proj", dtype: str = "F32", **changes: Any
) -> Any:
    """All elements of A are `a`, of B `b`, in the last layer; other layers are as trained."""
    parts = tensors(SHAPE, RANK, (target,), dtype)
    for name, tensor in parts.items():
        if f"layers.{SHAPE.num_layers - 1}." in name:
            value = a if "lora_A" in name else b
            count = tensor.shape[0] * tensor.shape[1]
            parts[name] = Tensor(dtype, tensor.shape, _filled(value, count, dtype))
    return upload(config(RANK, (target,), **changes), weights(parts))


@pytest.mark.parametrize("target", list(SHAPE.features))
@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        (1e30, 1e30, "lora_B"),
        (1e20, 1e20, "lora_B"),
        (-1e20, 1e20, "lora_B"),
        (1e-10, 1e38, "lora_B"),
        (3e37, 0.0, "lora_A"),
        (3e38, 3e38, "lora_A"),
        (0.0, 3.4e38, "lora_B"),
    ],
)
async def test_what_overflows_is_refused(a: float, b: float, named: str, target: str) -> None:
    with pytest.raises(
        InvalidAdapter, match=rf"layers\.1\.\w+\.{target}\.{named}.* holds"
    ) as error:
        await send(AdapterStore.open("memory://", BASE), "acme", _adapter(a, b, target))
    assert error.value.field == "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("element", [0, 17, -1])
async def test_one_element_is_enough(dtype: str, element: int) -> None:
    parts = tensors(SHAPE, RANK, ("down_proj",), dtype)
    name = list(parts)[1]
    width = 4 if dtype == "F32" else 2
    data = bytearray(parts[name].data)
    at = element * width % len(data)
    data[at : at + width] = _filled(-3e38, 1, dtype)
    parts[name] = Tensor(dtype, parts[name].shape, bytes(data))
    with pytest.raises(InvalidAdapter, match=name):
        await send(
            AdapterStore.open("memory://", BASE),
            "acme",
            upload(config(RANK, ("down_proj",)), weights(parts)),
        )


@pytest.mark.parametrize("alpha", [1e30, -1e30, 1e25])
async def test_a_scale_that_overflows_is_refused(alpha: float) -> None:
    with pytest.raises(InvalidAdapter, match=r"holds .* scale"):
        await send(
            AdapterStore.open("memory://", BASE), "acme", _adapter(0.02, 0.02, lora_alpha=alpha)
        )


@pytest.mark.parametrize(
    ("a", "b", "alpha"),
    [(0.0, 0.0, 8), (100.0, 100.0, 1000), (1e4, 1e-4, 8), (1e-4, 1e4, 8)],
)
async def test_what_training_may_give_is_not(a: float, b: float, alpha: float) -> None:
    adapter = _adapter(a, b, lora_alpha=alpha)
    await send(AdapterStore.open("memory://", BASE), "acme", adapter)


async def test_float16_cannot_hold_what_overflows() -> None:
    await send(AdapterStore.open("memory://", BASE), "acme", _adapter(65504, 65504, dtype="F16"))


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_taken_stays_finite_in_float32(seed: int) -> None:
    """Inputs as large as models are known to have, computed and squared in float32."""
    random = np.random.default_rng(seed)
    a, b = (float(10.0 ** random.uniform(-20, 20)) for _ in range(2))
    try:
        await send(AdapterStore.open("memory://", BASE), "acme", _adapter(a, b))
    except InvalidAdapter:
        return
    inputs, outputs = SHAPE.features["down_proj"]
    x = np.full(inputs, 1e4, np.float32)
    added = np.full((outputs, RANK), b, np.float32) @ (np.full((RANK, inputs), a, np.float32) @ x)
    assert np.isfinite(np.square(2 * added)).all()
