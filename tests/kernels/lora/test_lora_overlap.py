"""SGMV in graphs and beside the launches before it, on a GPU."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from lora_groups import (
    GATE_UP,
    OUT,
    activations,
    make_group,
    tiles_of,
    widths,
)

from granatum.kernels.adapters import LoraRows
from granatum.kernels.layer.norm import add_rms_norm
from granatum.kernels.layout import Tiles, make_tiles
from granatum.kernels.linear.linear import Workspace, launch_linear
from granatum.kernels.linear.tuning import Config as LinearConfig
from granatum.kernels.lora import ops as lora
from granatum.kernels.lora.expand import launch_expand
from granatum.kernels.lora.shrink import launch_shrink
from granatum.kernels.lora.tuning import Shape, default_config


@pytest.mark.gpu
@pytest.mark.parametrize("block_m", [4, 64])
def test_graph_replays_other_batches(block_m: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    ranks = [(16, 16), (8, 64), (0, 40), (256, 8)]
    group = make_group(GATE_UP, 1096, widths(block_m, 264, 264), ranks, torch.bfloat16, device)
    x, y = activations(group, 21)
    tiles = Tiles.allocate(21, block_m, device)
    tiles.fill(make_tiles([0] * 21, block_m))
    group.add(y, x, tiles)
    graph = torch.cuda.CUDAGraph()
    rows = group.rows(tiles, 21)
    with torch.cuda.graph(graph):
        lora.add_lora(y, x, group.packed, rows)
    for slots in ([1, 2, 3] * 7, [None] * 21, [3] * 21, [2] * 5 + [None] * 5 + [0] * 11):
        y.normal_()
        rows.workspace.fill_(torch.nan)
        expected = group.truth(y, x, slots)
        tiles.fill(make_tiles(slots, block_m))
        graph.replay()
        torch.testing.assert_close(y.double().cpu(), expected, rtol=4e-3, atol=1e-3)


@pytest.mark.gpu
def test_overlapping_launches_give_the_same_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    ranks = [(16, 16), (8, 64), (0, 40), (256, 8)]
    group = make_group(GATE_UP, 4096, (4096, 4096), ranks, torch.bfloat16, device)
    slots = [0, 1, 2, None, 3] * 6
    x, y = activations(group, len(slots))
    tiles = [tiles_of(slots, 4, device), tiles_of([None] * len(slots), 4, device)]
    shape = Shape(group.k, group.outs, group.table.max_rank, 4)
    results = []
    for pdl in (False, True):
        config = dataclasses.replace(default_config(shape), pdl=pdl)
        out, workspace = y.clone(), group.rows(tiles[0], len(slots)).workspace
        for step in range(60):  # each step overwrites what the step before it still reads
            rows = LoraRows(tiles[step % 3 == 1], workspace)
            launch_shrink(x, group.packed, rows, shape, config)
            launch_expand(out, group.packed, rows, shape, config)
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("block_m", [2, 64])
def test_a_shrink_beside_its_linear_reads_and_writes_in_order(block_m: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    size, slots = 4096, [0, 1, 2, None, 3, 1, 0] * 3
    ranks = [(16,), (8,), (64,), (256,)]
    group = make_group(OUT, size, (size,), ranks, torch.bfloat16, device)
    tiles = tiles_of(slots, block_m, device)
    x = torch.empty(len(slots), size, dtype=torch.bfloat16, device=device)
    weight = (size**-0.5 * torch.randn(size, size, device=device)).bfloat16()
    ones = torch.ones(size, dtype=torch.bfloat16, device=device)
    sums = Workspace.of_size(32 * size * 2, size // 64, device)
    rows = group.rows(tiles, len(slots))

    def run(synchronize: Callable[[], None], *, beside: bool) -> torch.Tensor:
        y, x_next, residual = x, torch.empty_like(x), torch.zeros_like(x)
        for _ in range(30):
            add_rms_norm(y, residual, ones, 1e-6, x_next)  # which the step before it still reads
            synchronize()
            y = launch_linear(x_next, weight, None, sums, LinearConfig(64, 128, 2, 4, 4))
            synchronize()
            lora.add_lora(y, x_next, group.packed, rows, beside_linear=beside)
            synchronize()
        return y

    x.normal_()
    run(torch.cuda.synchronize, beside=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lambda: None, beside=True)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(found, run(torch.cuda.synchronize, beside=False))
