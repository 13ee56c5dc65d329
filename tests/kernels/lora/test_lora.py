"""SGMV against float64 arithmetic on the adapters' own matrices."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from lora_groups import (
    DOWN,
    GATE_UP,
    HOSTILE_ROWS,
    HOSTILE_SLOTS,
    INNOCENT_ROWS,
    OUT,
    QKV,
    TOLERANCE,
    Group,
    activations,
    break_rows,
    make_group,
    tiles_of,
    widths,
)

from granatum.kernels.adapters import GroupLayout
from granatum.kernels.backend import runs_kernel
from granatum.kernels.linear.dense import Dense
from granatum.kernels.lora import ops as lora


def check(group: Group, slots: Sequence[int | None], block_m: int) -> None:
    x, y = activations(group, len(slots))
    expected = group.truth(y, x, slots)
    group.add(y, x, tiles_of(slots, block_m, y.device))
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance / 4)


POPULARITY = {
    "distinct": [0, 1, 2, 3, 4, 5],
    "uniform": [0, 0, 1, 1, 2, 2],
    "skewed": [0, 0, 0, 0, 0, 1, 1, 2],
    "identical": [3] * 19,
}


@pytest.mark.parametrize("block_m", [4, 16, 64])
@pytest.mark.parametrize("popularity", list(POPULARITY))
def test_popularity(
    popularity: str, block_m: int, dtype: torch.dtype, device: torch.device
) -> None:
    mixed = [(8, 16, 40), (64, 8, 8), (16, 16, 16), (1, 4, 33), (0, 24, 0), (16, 0, 8)]
    group = make_group(QKV, 72, widths(block_m, 40, 24, 24), mixed, dtype, device)
    check(group, POPULARITY[popularity], block_m)


@pytest.mark.parametrize("block_m", [2, 64])
@pytest.mark.parametrize("rank", [8, 40, 256])
def test_ranks(rank: int, block_m: int, dtype: torch.dtype, device: torch.device) -> None:
    outs = widths(block_m, 72, 72)
    group = make_group(GATE_UP, 520, outs, [(rank, rank), (rank, 0)], dtype, device)
    check(group, [0, 0, 1, None, 1], block_m)


@pytest.mark.parametrize("group_index", [OUT, DOWN])
def test_single_projections(group_index: int, dtype: torch.dtype, device: torch.device) -> None:
    group = make_group(group_index, 200, (264,), [(16,), (8,)], dtype, device)
    check(group, [1, None, 0, 0, 1], 4)


@pytest.mark.parametrize("block_m", [4, 16])
@pytest.mark.parametrize(
    "slots",
    [
        [None] * 5,
        [0, 1, 0, 1, 0],
        [None, 2, 2, None, 2, 0],
        [-1, 1, -1],
        [2],
        [3, 3],
    ],
)
def test_tile_lists(slots: list[int | None], block_m: int, device: torch.device) -> None:
    ranks = [(16,), (8,), (40,), (0,)]
    group = make_group(OUT, 96, (72,), ranks, torch.float32, device)
    check(group, slots, block_m)


def test_fuzzed_tile_lists(device: torch.device) -> None:
    ranks = [(16, 8), (8, 0), (0, 0), (0, 48), (32, 32)]
    group = make_group(GATE_UP, 64, (48, 48), ranks, torch.float32, device)
    generator = random.Random(1)
    for _ in range(8):
        runs = [
            [generator.choice([None, 0, 1, 2, 3, 4])] * generator.randint(1, 9)
            for _ in range(generator.randint(1, 5))
        ]
        check(group, list(itertools.chain(*runs)), generator.choice([4, 16]))


EVERY_ROW = [
    [None] * 3 + [0] * 20 + [2] + [1] * 5,
    [0, 1, None, 2, 3, 0, None, 1],  # more tiles than blocks across
    [None] * 20,
]


def make_wide_group(block_m: int, dtype: torch.dtype, device: torch.device) -> Group:
    ranks = [(8, 16, 40), (16, 0, 8), (0, 0, 0), (24, 24, 24)]
    return make_group(QKV, 136, widths(block_m, 72, 40, 40), ranks, dtype, device)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("slots", EVERY_ROW)
@pytest.mark.parametrize("biased", [False, True])
def test_y_made_of_what_adapters_add(
    slots: list[int | None], biased: bool, block_m: int, device: torch.device
) -> None:
    group = make_wide_group(block_m, torch.bfloat16, device)
    x, y = activations(group, len(slots))
    bias = torch.randn(y.shape[1]).to(y) if biased else None
    expected = group.truth(torch.zeros_like(y) if bias is None else bias.expand_as(y), x, slots)
    tiles = tiles_of(slots, block_m, device, base=True)
    rows = group.rows(tiles, len(slots))
    y.fill_(torch.nan)
    lora.shrink(x, group.packed, rows)
    lora.expand_from(bias, y, group.packed, rows)
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("slots", EVERY_ROW)
@pytest.mark.parametrize("many", [False, True])
def test_a_linear_with_lora(
    slots: list[int | None],
    many: bool,
    block_m: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "MANY_ROWS", 1 if many else 1000)
    group = make_wide_group(block_m, dtype, device)
    x, y = activations(group, len(slots))
    weight = (torch.randn(y.shape[1], group.k) * group.k**-0.5).to(x)
    bias = torch.randn(y.shape[1]).to(x)
    product = x.double() @ weight.double().T
    expected = group.truth(product + bias.double(), x, slots)
    tiles = tiles_of(slots, block_m, device, base=True)
    rows = group.rows(tiles, len(slots))
    found = lora.linear_with_lora(Dense(weight, bias), x, group.packed, rows).double().cpu()
    # Parts may be rounded before their sum is.
    whole = (product + bias.double()).cpu()
    parts = product.abs().cpu() + bias.abs().cpu() + (expected - whole).abs()
    assert ((found - expected).abs() <= 2 * TOLERANCE[dtype] * (parts + 0.1)).all()


def test_a_missing_layer_costs_nothing(device: torch.device) -> None:
    group = make_group(QKV, 64, (32, 16, 16), [(8, 8, 8)], torch.float32, device)
    group.table.rank.zero_()
    x, y = activations(group, 3)
    before = y.clone()
    group.add(y, x, tiles_of([0, 0, 0], 4, device))
    assert torch.equal(y, before)


@pytest.mark.parametrize("block_m", [4, 8, 64])
def test_a_row_is_bit_identical_in_any_company(block_m: int, device: torch.device) -> None:
    if not runs_kernel(torch.empty(0, device=device)):
        pytest.skip("torch's matrix products on the CPU depend on the number of rows")
    ranks = [(16, 16, 16), (8, 64, 0), (40, 8, 8)]
    group = make_group(QKV, 600, widths(block_m, 40, 24, 24), ranks, torch.bfloat16, device)
    x, y = activations(group, 11)
    slots = [0, 0, 0, 1, None, 2, 2, 2, 2, 2, 0]
    crowd = y.clone()
    group.add(crowd, x, tiles_of(slots, block_m, device))
    for t, slot in list(enumerate(slots))[::2]:
        alone = y[t : t + 1].clone()
        group.add(alone, x[t : t + 1], tiles_of([slot], block_m, device))
        assert torch.equal(alone[0], crowd[t])


def test_rows_of_wider_tensors(device: torch.device) -> None:
    group = make_group(OUT, 64, (48,), [(16,)], torch.float32, device)
    wide_x, wide_y = torch.randn(2, 5, 128, device=device)
    x, y = wide_x[:, 16:80], wide_y[:, 32:80]
    expected, rest = group.truth(y, x, [0] * 5), wide_y[:, 80:].clone()
    group.add(y, x, tiles_of([0] * 5, 4, device))
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide_y[:, 80:], rest)


@pytest.mark.parametrize("block_m", [4, 16, 64])
def test_rows_in_another_order(block_m: int, dtype: torch.dtype, device: torch.device) -> None:
    outs = widths(block_m, 40, 24, 24)
    group = make_group(QKV, 72, outs, [(8, 16, 40), (16, 0, 8)], dtype, device)
    slots = [1, 0, None, 1, 0, 1, 1, 0, 1]
    x, y = activations(group, len(slots))
    expected = group.truth(y, x, slots)
    order = sorted(range(len(slots)), key=lambda t: slots[t] or 0)
    tiles = tiles_of([slots[t] for t in order], block_m, device)
    indices = torch.tensor(order, dtype=torch.int32, device=device)
    group.add(y, x, dataclasses.replace(tiles, order=indices))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_shrink_and_expand_apart_are_add_lora(device: torch.device) -> None:
    group = make_group(GATE_UP, 1100, (40, 40), [(16, 8)], torch.float32, device)
    x, y = activations(group, 3)
    expected = group.truth(y, x, [0, None, 0])
    tiles = tiles_of([0, None, 0], 4, device)
    rows = group.rows(tiles, 3)
    lora.shrink(x, group.packed, rows)
    lora.expand(y, group.packed, rows)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    group = make_group(OUT, 64, (48,), [(16,)], torch.float32, torch.device("cpu"))
    x, y = activations(group, 3)
    rows, packed = group.rows(tiles_of([0, 0, 0], 4, y.device), 3), group.packed
    with pytest.raises(ValueError, match="x must be"):
        lora.shrink(x.T.contiguous().T, packed, rows)
    with pytest.raises(ValueError, match="float32 elements"):
        lora.shrink(x, packed, dataclasses.replace(rows, workspace=rows.workspace[1:]))
    with pytest.raises(ValueError, match="y must be"):
        lora.expand(y[:, :40], packed, rows)
    with pytest.raises(ValueError, match="group 1"):
        dataclasses.replace(packed, out_features=(8, 8))
    with pytest.raises(ValueError, match="projections"):
        GroupLayout((3, 4))


def test_projections_are_counted_across_the_layer() -> None:
    layout = GroupLayout((3, 1, 2, 1))
    assert (layout.first, layout.count) == ((0, 3, 4, 6), 7)


@pytest.mark.parametrize("block_m", [4, 16, 64])
def test_numbers_that_break_stay_in_their_rows(block_m: int, device: torch.device) -> None:
    """Adapters of such numbers, and rows of them, beside rows of whose bits none changes."""
    group = make_group(
        QKV, 136, widths(block_m, 72, 40, 40), [(8, 16, 40)] * 3, torch.bfloat16, device
    )
    x, y = activations(group, len(HOSTILE_SLOTS))
    tiles = tiles_of(HOSTILE_SLOTS, block_m, device, base=True)
    undisturbed = y.clone()
    group.add(undisturbed, x, tiles)
    break_rows(group, x, y)
    group.add(y, x, tiles)
    assert torch.equal(y[INNOCENT_ROWS], undisturbed[INNOCENT_ROWS])
    assert not y[HOSTILE_ROWS].isfinite().all()
