"""Norms, positions and activation against float64."""

import pytest
import torch
from layer_truth import normed, turn

from granatum.kernels.backend import INTERPRETING
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.norm import add_rms_norm, embed_rms_norm
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, RowPlaces

BFLOAT16 = 8e-3 if INTERPRETING else 4e-3  # the interpreter cuts off what rounding would keep
TOLERANCE = {torch.bfloat16: BFLOAT16, torch.float16: 6e-4, torch.float32: 2e-6}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected.cpu(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("n", [64, 100, 4096])
def test_embed_rms_norm(n: int, dtype: torch.dtype, device: torch.device) -> None:
    embedding = torch.randn(7, n, device=device).to(dtype)
    weight = torch.randn(n, device=device).to(dtype)
    tokens = torch.tensor([6, 0, -3, 5, -1, -3], dtype=torch.int32, device=device)
    last = torch.tensor([4, 99, 2], dtype=torch.int32, device=device)
    residual, out = torch.full((2, 6, n), torch.nan, dtype=dtype, device=device)
    embed_rms_norm(tokens, last, embedding, weight, 1e-5, residual, out)
    assert torch.equal(residual, embedding[[6, 0, 2, 5, 4, 2]])
    assert_close(out, normed(residual, weight, 1e-5))


def test_add_rms_norm(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = torch.randn(2, 5, 96, device=device).to(dtype)
    weight = torch.randn(96, device=device).to(dtype)
    out = torch.full_like(x, torch.nan)
    summed = x.double() + residual.double()
    add_rms_norm(x, residual, weight, 1e-5, out)
    assert_close(residual, summed)
    assert_close(out, normed(residual, weight, 1e-5))
    kept = residual.clone()
    add_rms_norm(x.zero_(), residual, weight, 1e-5)
    assert torch.equal(x, out)
    assert torch.equal(residual, kept)


def test_norms_of_scaled_rows(dtype: torch.dtype, device: torch.device) -> None:
    embedding = torch.randn(7, 96, device=device).to(dtype)
    weight = torch.randn(96, device=device).to(dtype)
    tokens = torch.tensor([6, -1], dtype=torch.int32, device=device)
    last = torch.tensor([4], dtype=torch.int32, device=device)
    residual, out = torch.full((2, 2, 96), torch.nan, dtype=dtype, device=device)
    embed_rms_norm(tokens, last, embedding, weight, 1e-5, residual, out, scale=12.0)
    assert_close(residual, 12 * embedding[[6, 4]].double())
    assert_close(out, normed(residual, weight, 1e-5))
    x = torch.randn(2, 96, device=device).to(dtype)
    summed = residual.double() + 0.21875 * x.double()
    some = torch.full_like(x[:1], torch.nan)
    rows = torch.tensor([1], dtype=torch.int32, device=device)
    add_rms_norm(x, residual, weight, 1e-5, some, rows, scale=0.21875)
    add_rms_norm(x, residual, weight, 1e-5, out, scale=0.21875)
    assert_close(residual, summed)
    assert_close(out, normed(residual, weight, 1e-5))
    assert torch.equal(some, out[1:])


def test_add_rms_norm_of_some_rows(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = torch.randn(2, 5, 96, device=device).to(dtype)
    weight = torch.randn(96, device=device).to(dtype)
    rows = torch.tensor([4, 0, 4], dtype=torch.int32, device=device)
    some, kept = torch.full_like(x[:3], torch.nan), residual.clone()
    add_rms_norm(x, residual, weight, 1e-5, some, rows)
    assert torch.equal(residual, kept)
    add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(some, x[[4, 0, 4]])


def test_silu_mul(dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (4 * torch.randn(3, 2 * 1100, device=device)).to(dtype)
    out = torch.full((3, 1100), torch.nan, dtype=dtype, device=device)
    silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(out, gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("head_dim", [32, 48])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rope_and_write_kv(
    head_dim: int, qk_norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    heads, layers, layer, pages = 4, 2, 1, 5
    kv = KvLayout(layers * 2 * 2 * 16 * head_dim + 64, 16, 2, head_dim)
    arena = torch.full((pages, kv.page_elements), 7.0, dtype=dtype, device=device)
    qkv = torch.randn(4, (heads + 4) * head_dim, device=device).to(dtype)
    q, k, v = torch.split(qkv, [heads * head_dim, 2 * head_dim, 2 * head_dim], dim=1)
    positions = torch.tensor([0, 17, 3, 99], dtype=torch.int32, device=device)
    slots = torch.tensor([3 * 16 + 5, 0 * 16 + 15, -1, 4 * 16], dtype=torch.int32, device=device)
    angles = torch.outer(torch.arange(100.0), 1e4 ** -torch.linspace(0, 1, head_dim // 2))
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    norms = torch.randn(2, head_dim, device=device).to(dtype) if qk_norm else None
    q_norm, k_norm = (None, None) if norms is None else norms
    before = qkv.clone()

    rotary = Rotary(cos, sin, q_norm, k_norm, 1e-6)
    rope_and_write_kv(q, k, v, rotary, LayerKv(arena, kv, layer), RowPlaces(positions, slots))

    expected = torch.full_like(arena, 7.0).double()
    for t, slot in enumerate(slots.tolist()):
        token_q = before[t, : heads * head_dim].double().view(heads, head_dim)
        token_k, token_v = before[t, heads * head_dim :].double().view(2, 2, head_dim)
        if slot < 0:
            assert torch.equal(qkv[t], before[t])
            continue
        at = int(positions[t])
        turned_q = turn(token_q, q_norm, angles[at].to(device))
        assert_close(q[t], turned_q.flatten())
        for head in range(2):
            for plane, value in ((0, turn(token_k, k_norm, angles[at].to(device))), (1, token_v)):
                start = (((layer * 2 + plane) * 2 + head) * 16 + slot % 16) * head_dim
                expected[slot // 16, start : start + head_dim] = value[head]
    assert_close(arena, expected)
    assert torch.equal(qkv[:, heads * head_dim :], before[:, heads * head_dim :])
