"""The steps that judge configurations: on a CPU, where the torch twins compute them."""

import pytest
import torch

from granatum.kernels.device import Gpu
from granatum.models.config import ModelConfig
from granatum.runner.tune import rig as rigs
from granatum.runner.tune.rig import Load, Rig, geometric_mean, loads, same
from granatum.runner.tune.tasks import tasks

TINY = ModelConfig(96, 32, 64, 2, 4, 2, 8, 4096)
A10 = Gpu("NVIDIA A10", sms=72, shared_memory=101376, capability=(8, 6))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rig() -> Rig:
    torch.manual_seed(0)
    return Rig(TINY, 16, CPU, torch.float32)


@pytest.mark.parametrize("load", [
    Load(1, 1, 8, prompts=False), Load(32, 32, 16, prompts=False),
    Load(512, 1, 16, prompts=True), Load(256, 2, 8, prompts=True),
])  # fmt: skip
def test_a_step_computes_with_every_rows_adapter(load: Load, rig: Rig) -> None:
    step = rig.fill(load)
    assert step.shape.lora
    assert step.shape.rows == load.rows
    model = rig.model()
    logits = rig.forward(model, step).clone()
    assert logits.isfinite().all()
    assert same(rig.forward(model, step), logits)
    rig._table.scale.fill_(100.0)
    changed = rig.forward(model, step)
    rig._table.scale.fill_(1.0)
    for row, other in zip(logits, changed, strict=True):
        assert not torch.allclose(row, other)


def test_adapters_and_pages_lie_apart(rig: Rig) -> None:
    table, rank = rig._table, rig.max_rank
    pieces = []
    first = 0
    for group, (name, k) in enumerate(rig.config.in_features.items()):
        outs = rig.config.out_features[name]
        pieces += [(int(at), rank * k * len(outs)) for at in table.a[:, :, group].flatten()]
        for index, n in enumerate(outs):
            pieces += [(int(at), rank * n) for at in table.b[:, :, first + index].flatten()]
        first += len(outs)
    pieces.sort()
    kv = rigs.SEQUENCES * rig.limits.pages_for(rigs.CONTEXT) * rig._arena.kv.page_elements
    ends = [kv, *(at + size for at, size in pieces)]
    assert all(end <= at for end, (at, _) in zip(ends, pieces, strict=False))
    assert ends[-1] <= rig._arena.pages.numel()


def test_a_linear_is_judged_by_a_step_of_its_rows() -> None:
    wanted = tasks(TINY, 64, A10)
    assert {load.rows for t in wanted if t.rows == 32 for load in loads(t, 64)} == {32}
    prompts = [load for t in wanted if t.prompts for load in loads(t, 64)]
    assert {load.rank for load in prompts} == {16, 64}
    assert all(load.rows <= rigs.MOST_ROWS for load in prompts)


def test_logits_that_differ_by_more_than_rounding_are_others() -> None:
    logits = torch.randn(4, 96)
    assert same(logits * (1 + 1e-3), logits)
    assert not same(torch.full_like(logits, torch.nan), logits)
    assert not same(logits.roll(1), logits)


def test_the_mean_is_of_ratios() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
