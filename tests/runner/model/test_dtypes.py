"""Weights, KV and adapters have dtypes of their own; one arena holds the latter two."""

import pytest
import torch

from granatum.runner.model.dtypes import Dtypes


def test_a_cpu_computes_in_float32_and_a_gpu_in_bfloat16() -> None:
    assert Dtypes.on(torch.device("cpu")) == Dtypes(torch.float32, torch.float32, torch.float32)
    assert Dtypes.on(torch.device("cuda:1")).weights is torch.bfloat16


def test_weights_may_differ_from_what_the_arena_holds() -> None:
    mixed = Dtypes(torch.float8_e4m3fn, kv=torch.bfloat16, adapters=torch.bfloat16)
    assert mixed.weights is not mixed.kv
    with pytest.raises(ValueError, match="one arena"):
        Dtypes(torch.bfloat16, kv=torch.float8_e4m3fn, adapters=torch.bfloat16)
