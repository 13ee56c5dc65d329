"""LoRA within the activation and the positions against float64 arithmetic."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from layer_truth import turn
from lora_groups import (
    GATE_UP,
    HOSTILE_ROWS,
    HOSTILE_SLOTS,
    INNOCENT_ROWS,
    LAYER,
    QKV,
    TOLERANCE,
    Group,
    activations,
    break_rows,
    make_group,
    tiles_of,
    widths,
)

from granatum.kernels.backend import runs_kernel
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, RowPlaces, Tiles, make_tiles
from granatum.kernels.lora import ops as lora

MIXED = [(16, 16), (8, 0), (0, 40), (0, 0), (40, 8)]
SLOTS = [
    [0],
    [None, None, None],
    [0, 1, 2, 3, 4, None],
    [None] * 3 + [0] * 20 + [2] + [4] * 5,
    [4] * 3 + [None] + [1] * 2 + [3, 3] + [0] * 2,
]


def silu_mul(group: Group, y: torch.Tensor, x: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """The op's result, of an `out` that held NaN; y, which the op may change, stays."""
    y = y.clone()
    out = y.new_full((y.shape[0], group.outs[0]), torch.nan)
    lora.silu_mul_with_lora(y, x, out, group.packed, group.rows(tiles, x.shape[0]))
    return out


def silu_mul_truth(
    group: Group, y: torch.Tensor, x: torch.Tensor, slots: Sequence[int | None]
) -> torch.Tensor:
    gate, up = group.truth(y, x, slots).chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 3 * TOLERANCE[found.dtype]  # what adapters add may be rounded apart
    torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("block_m", [2, 16, 64])
@pytest.mark.parametrize("slots", SLOTS)
def test_silu_mul_with_lora(
    slots: list[int | None], block_m: int, dtype: torch.dtype, device: torch.device
) -> None:
    group = make_group(GATE_UP, 136, widths(block_m, 72, 72), MIXED, dtype, device)
    x, y = activations(group, len(slots))
    expected = silu_mul_truth(group, y, x, slots)
    assert_close(silu_mul(group, y, x, tiles_of(slots, block_m, device, base=True)), expected)


@pytest.mark.parametrize("block_m", [2, 64])
@pytest.mark.parametrize("width", [72, 320])
def test_silu_mul_with_high_ranks(width: int, block_m: int, device: torch.device) -> None:
    ranks = [(256, 256), (64, 256), (256, 0)]
    group = make_group(GATE_UP, 520, (width, width), ranks, torch.bfloat16, device)
    slots = [0, 0, 0, 1, None, 2]
    x, y = activations(group, len(slots))
    expected = silu_mul_truth(group, y, x, slots)
    assert_close(silu_mul(group, y, x, tiles_of(slots, block_m, device, base=True)), expected)


def test_silu_mul_with_fuzzed_tiles(device: torch.device) -> None:
    group = make_group(GATE_UP, 64, (48, 48), MIXED, torch.float32, device)
    generator = random.Random(2)
    for _ in range(6):
        slots: list[int | None] = []
        for _ in range(generator.randint(1, 5)):
            slots += [generator.choice([None, 0, 1, 2, 3, 4])] * generator.randint(1, 9)
        x, y = activations(group, len(slots))
        tiles = tiles_of(slots, generator.choice([2, 3, 16]), device, base=True)
        expected = silu_mul_truth(group, y, x, slots)
        assert_close(silu_mul(group, y, x, tiles), expected)


@pytest.mark.parametrize("block_m", [2, 16, 64])
def test_silu_mul_in_another_order(block_m: int, dtype: torch.dtype, device: torch.device) -> None:
    group = make_group(GATE_UP, 72, widths(block_m, 40, 40), MIXED, dtype, device)
    slots = [1, 0, None, 1, 0, 2, 2, 0, 1]
    x, y = activations(group, len(slots))
    order = sorted(range(len(slots)), key=lambda t: slots[t] or 0)
    tiles = tiles_of([slots[t] for t in order], block_m, device, base=True)
    indices = torch.tensor(order, dtype=torch.int32, device=device)
    expected = silu_mul_truth(group, y, x, slots)
    assert_close(silu_mul(group, y, x, dataclasses.replace(tiles, order=indices)), expected)


@pytest.mark.parametrize("block_m", [2, 8, 64])
def test_an_activation_is_bit_identical_in_any_company(block_m: int, device: torch.device) -> None:
    if not runs_kernel(torch.empty(0, device=device)):
        pytest.skip("torch's matrix products on the CPU depend on the number of rows")
    group = make_group(GATE_UP, 600, widths(block_m, 72, 72), MIXED, torch.bfloat16, device)
    slots = [0, 0, 0, 1, None, 2, 2, 4, 4, 4, 0]
    x, y = activations(group, len(slots))
    crowd = silu_mul(group, y, x, tiles_of(slots, block_m, device, base=True))
    for t, slot in list(enumerate(slots))[::2]:
        row = slice(t, t + 1)
        alone = silu_mul(group, y[row], x[row], tiles_of([slot], block_m, device, base=True))
        assert torch.equal(alone[0], crowd[t])


@pytest.mark.parametrize("block_m", [2, 16, 64])
def test_numbers_that_break_an_activation_stay_in_their_rows(
    block_m: int, device: torch.device
) -> None:
    outs = widths(block_m, 72, 72)
    group = make_group(GATE_UP, 136, outs, [(16, 16)] * 3, torch.bfloat16, device)
    x, y = activations(group, len(HOSTILE_SLOTS))
    tiles = tiles_of(HOSTILE_SLOTS, block_m, device, base=True)
    undisturbed = silu_mul(group, y, x, tiles)
    break_rows(group, x, y)
    found = silu_mul(group, y, x, tiles)
    assert torch.equal(found[INNOCENT_ROWS], undisturbed[INNOCENT_ROWS])
    assert not found[HOSTILE_ROWS].isfinite().all()


@dataclasses.dataclass
class Heads:
    """A group of adapters for q, k and v, in an arena that begins with pages of KV."""

    group: Group
    kv: KvLayout
    heads: int
    pages: torch.Tensor

    @classmethod
    def make(
        cls, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device
    ) -> "Heads":
        outs = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        ranks = [(16, 8, 40), (0, 16, 8), (8, 0, 0), (0, 0, 0), (24, 24, 24)]
        group = make_group(QKV, 136, outs, ranks, dtype, device)
        kv = KvLayout(2 * 2 * kv_heads * 16 * head_dim + 64, 16, kv_heads, head_dim)
        pages = torch.full((5, kv.page_elements), 7.0, dtype=dtype, device=device)
        filler = -group.arena.numel() % kv.page_elements
        pieces = (pages.flatten(), group.arena, pages.new_full((filler,), torch.nan))
        group.arena = torch.cat(pieces).view(-1, kv.page_elements)
        group.table.a.add_(pages.numel())
        group.table.b.add_(pages.numel())
        return cls(group, kv, heads, group.arena[:5])

    def run(
        self,
        qkv: torch.Tensor,
        x: torch.Tensor,
        rotary: Rotary,
        places: RowPlaces,
        tiles: Tiles,
    ) -> None:
        kv = LayerKv(self.group.arena, self.kv, LAYER)
        rows = self.group.rows(tiles, x.shape[0])
        lora.rope_with_lora(qkv, x, rotary, kv, places, self.group.packed, rows)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "normed", "block_m"),
    [(32, 4, 2, False, 16), (48, 4, 4, True, 16), (128, 3, 1, True, 64), (128, 4, 2, False, 64)],
)
def test_rope_with_lora(
    slots: list[int | None],
    head_dim: int,
    heads: int,
    kv_heads: int,
    normed: bool,
    block_m: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    made = Heads.make(head_dim, heads, kv_heads, dtype, device)
    x, qkv = activations(made.group, len(slots))
    pages = made.pages.double().cpu()
    truth = made.group.truth(qkv, x, slots)
    positions = torch.arange(len(slots), dtype=torch.int32, device=device) * 3 % 50
    kv_slots = (torch.arange(len(slots), dtype=torch.int32, device=device) * 7 + 5) % 80
    kv_slots[1::5] = -1
    angles = torch.outer(torch.arange(50.0), 1e4 ** -torch.linspace(0, 1, head_dim // 2))
    norms = torch.randn(2, head_dim).to(dtype).to(device) if normed else [None, None]
    rotary = Rotary(angles.cos().to(device), angles.sin().to(device), norms[0], norms[1], 1e-6)

    tiles = tiles_of(slots, block_m, device, base=True)
    made.run(qkv, x, rotary, RowPlaces(positions, kv_slots), tiles)

    wide, narrow = made.group.outs[:2]
    q_norm, k_norm = (None if n is None else n.cpu() for n in norms)
    for t, slot in enumerate(kv_slots.tolist()):
        if slot < 0:
            continue
        angle = angles[int(positions[t])]
        q, k, v = (
            part.view(-1, head_dim) for part in torch.split(truth[t], [wide, narrow, narrow])
        )
        assert_close(qkv[t, :wide], turn(q, q_norm, angle).flatten())
        for head in range(kv_heads):
            for plane, values in ((0, turn(k, k_norm, angle)), (1, v)):
                start = (((LAYER * 2 + plane) * kv_heads + head) * 16 + slot % 16) * head_dim
                pages[slot // 16, start : start + head_dim] = values[head]
    assert_close(made.pages, pages)


def test_a_rotation_is_bit_identical_in_any_company(device: torch.device) -> None:
    if not runs_kernel(torch.empty(0, device=device)):
        pytest.skip("torch's matrix products on the CPU depend on the number of rows")
    made = Heads.make(128, 4, 2, torch.bfloat16, device)
    slots = [0, 0, None, 1, 4, 4, 2]
    x, qkv = activations(made.group, len(slots))
    positions, kv_slots = torch.arange(2 * len(slots), dtype=torch.int32, device=device).chunk(2)
    angles = torch.rand(50, 64, device=device)
    rotary = Rotary(angles.cos(), angles.sin())
    crowd = qkv.clone()
    tiles = tiles_of(slots, 64, device, base=True)
    made.run(crowd, x, rotary, RowPlaces(positions, kv_slots), tiles)
    written = made.pages.clone()
    for t, slot in enumerate(slots):
        row, alone = slice(t, t + 1), qkv[t : t + 1].clone()
        tiles = tiles_of([slot], 64, device, base=True)
        made.run(alone, x[row], rotary, RowPlaces(positions[row], kv_slots[row]), tiles)
        assert torch.equal(alone[0], crowd[t])
    assert torch.equal(made.pages, written)


def test_refusals() -> None:
    device = torch.device("cpu")
    group = make_group(GATE_UP, 64, (48, 48), MIXED, torch.float32, device)
    x, y = activations(group, 3)
    tiles = tiles_of([0, 0, 0], 2, device)
    rest = (group.packed, group.rows(tiles, 3))
    with pytest.raises(ValueError, match="y must be"):
        lora.silu_mul_with_lora(y[:, :90], x, y[:, :48], *rest)
    with pytest.raises(ValueError, match="out must be"):
        lora.silu_mul_with_lora(y, x, y[:, ::2], *rest)
    with pytest.raises(ValueError, match="40 wide"):
        lora.silu_mul_with_lora(y, x, y[:, :40], *rest)
    made = Heads.make(32, 4, 2, torch.float32, device)
    x, qkv = activations(made.group, 3)
    numbers, angles = torch.zeros(3, dtype=torch.int32), torch.zeros(9, 16)
    with pytest.raises(ValueError, match="positions and kv_slots"):
        made.run(qkv, x, Rotary(angles, angles), RowPlaces(numbers[:2], numbers), tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("block_m", [2, 64])
def test_an_activations_graph_replays_other_batches(block_m: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    ranks = [(16, 16), (8, 64), (0, 40), (256, 8)]
    group = make_group(GATE_UP, 1096, widths(block_m, 264, 264), ranks, torch.bfloat16, device)
    x, y = activations(group, 21)
    tiles = Tiles.allocate(21, block_m, device)
    tiles.fill(make_tiles([0] * 21, block_m, base=True))
    out = silu_mul(group, y, x, tiles)
    graph = torch.cuda.CUDAGraph()
    rows = group.rows(tiles, 21)
    with torch.cuda.graph(graph):
        lora.silu_mul_with_lora(y, x, out, group.packed, rows)
    for slots in ([1, 2, 3] * 7, [None] * 21, [3] * 21, [2] * 5 + [None] * 5 + [0] * 11):
        y.normal_()
        rows.workspace.fill_(torch.nan)
        out.fill_(torch.nan)
        tiles.fill(make_tiles(slots, block_m, base=True))
        graph.replay()
        assert_close(out, silu_mul_truth(group, y, x, slots))
