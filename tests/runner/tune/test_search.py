"""The search with a fake clock and GPUs that are not there."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from granatum.kernels.device import Gpu
from granatum.kernels.linear import tuning as linear
from granatum.kernels.lora import tuning as lora
from granatum.kernels.tables import tables
from granatum.models.config import ModelConfig
from granatum.runner.tune.__main__ import fill
from granatum.runner.tune.search import keep, pending, search
from granatum.runner.tune.tasks import Choice, Task, linear_bytes, tasks, unmeasured

A10 = Gpu("NVIDIA A10", sms=72, shared_memory=101376, capability=(8, 6))
H100 = Gpu("NVIDIA H100 PCIe", sms=114, shared_memory=232448, capability=(9, 0))
LLAMA_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
SMALL = ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 2048)


@pytest.fixture(autouse=True)
def no_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_users", {})


class FakeClock:
    """Every field that differs from the default costs, but those of the best configuration."""

    def __init__(self, best: dict[str, Choice] | None = None, stops_after: int = 10_000) -> None:
        self.best = best or {}
        self.asked: list[tuple[Task, list[Choice]]] = []
        self.left = stops_after

    def __call__(self, task: Task, tried: Sequence[Choice]) -> list[float]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.append((task, list(tried)))
        best = (self.best.get(task.op) or {}).items()
        return [1.0 + 0.01 * len(best ^ (choice or {}).items()) for choice in tried]


def test_every_entry_that_a_runner_looks_up_is_there_once() -> None:
    wanted = tasks(LLAMA_8B, 60, H100)
    entries = [(task.op, task.shape, task.size) for task in wanted]
    assert len(set(entries)) == len(entries) == 8 + 3 * 5
    for group, block_m in (("down", lora.DECODE_BLOCK_M), ("qkv", lora.PREFILL_BLOCK_M)):
        shape = lora.Shape(LLAMA_8B.in_features[group], LLAMA_8B.out_features[group], 64, block_m)
        assert (lora.OP, shape.key, 64) in entries  # rank 60 lies in 64 rows
    assert (linear.OP, linear.shape_key(4096, 128256), 32) in entries


@pytest.mark.parametrize("op", [lora.OP, linear.OP])
def test_the_search_finds_the_fastest(op: str) -> None:
    best: dict[str, Choice] = {
        lora.OP: {"rank_blocks": 4, "expand_n": 128, "expand_span": 128, "pdl": False},
        linear.OP: {"block_n": 64, "block_k": 128, "splits": 2, "warps": 4, "stages": 6},
    }
    shape = "4096->14336+14336 bf16 by rows" if op == lora.OP else "4096->4096 bf16"
    task = next(task for task in tasks(LLAMA_8B, 64, H100) if task.shape == shape)
    assert search(task, FakeClock(best)) == best[op]


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    for task in tasks(SMALL, 16, A10):
        assert search(task, lambda _task, tried: [1.0] + [0.999] * (len(tried) - 1)) is None


def test_what_cannot_run_is_not_chosen() -> None:
    def clock(_task: Task, tried: Sequence[Choice]) -> list[float]:
        runs = [choice is None or choice["splits"] == 1 for choice in tried]
        return [1.0, *(0.1 if can_run else math.inf for can_run in runs[1:])]

    task = next(t for t in tasks(LLAMA_8B, 64, H100) if t.shape == "4096->28672 bf16")
    found = search(task, clock)
    assert found is not None
    assert found["splits"] == 1


def test_configurations_that_do_not_fit_shared_memory_are_not_tried() -> None:
    def tried(gpu: Gpu) -> dict[tuple[str, int], set[str]]:
        clock = FakeClock()
        for task in tasks(LLAMA_8B, 64, gpu):
            search(task, clock)
        found: dict[tuple[str, int], set[str]] = {}
        for task, choices in clock.asked:
            found.setdefault((task.shape, task.size), set()).update(map(str, choices))
            for choice in choices:
                if task.op == linear.OP and choice is not None:
                    assert linear_bytes(linear.Config(**choice), task.size) <= gpu.shared_memory
        return found

    little, much = tried(replace(A10, shared_memory=64 << 10)), tried(H100)
    entry = ("14336->4096 bf16", 64)
    assert "'stages': 6" in str(much[entry])
    assert "'stages': 6" not in str(little[entry])
    prompts = ("4096->4096 bf16 by tiles", 64)
    assert "'shrink_r': 64" in str(much[prompts])
    assert "'shrink_r': 64" not in str(little[prompts])
    assert not any("pdl" in choice for choices in little.values() for choice in choices)


def test_a_second_start_goes_on_where_the_first_one_ended(tmp_path: Path) -> None:
    first = FakeClock({linear.OP: None}, stops_after=9)
    with pytest.raises(KeyboardInterrupt):
        fill(SMALL, 16, A10, tmp_path, first)
    done = {(t.op, t.shape, t.size) for t, _ in first.asked[:-1]}
    left = pending(tasks(SMALL, 16, A10), tmp_path, A10)
    assert 0 < len(left) < len(tasks(SMALL, 16, A10))
    second = FakeClock()
    fill(SMALL, 16, A10, tmp_path, second)
    again = {(t.op, t.shape, t.size) for t, _ in second.asked}
    assert again == {(t.op, t.shape, t.size) for t in left}
    assert len(again & done) <= 1  # the entry that was interrupted between its phases
    third = FakeClock()
    fill(SMALL, 16, A10, tmp_path, third)
    assert third.asked == []


def test_a_runner_takes_what_was_found(tmp_path: Path) -> None:
    assert unmeasured(SMALL, 16, A10)
    shape = lora.Shape(576, (576, 192, 192), 16, lora.DECODE_BLOCK_M)
    fill(SMALL, 16, A10, tmp_path, FakeClock({lora.OP: {"chunk_k": 256, "shrink_k": 256}}))
    tables._users.clear()
    assert lora.measured(A10, shape) == lora.default_config(shape)
    tables.add(tmp_path, A10, {lora.OP: lora.FIELDS, linear.OP: linear.FIELDS})
    assert lora.measured(A10, shape).chunk_k == 256
    assert unmeasured(SMALL, 16, A10) == []


def test_only_a_known_gpu_and_model_are_measured() -> None:
    assert unmeasured(LLAMA_8B, 64, H100) == []
    assert len(unmeasured(LLAMA_8B, 64, A10)) == 8 + 5
    assert "lora 576->576+192+192 bf16 by rows" in unmeasured(SMALL, 64, H100)


def test_an_entry_that_is_kept_serves_at_once(tmp_path: Path) -> None:
    (task, *_) = tasks(SMALL, 16, A10)
    keep(task, {"rank_blocks": 1}, tmp_path, A10)
    assert tables.find(A10, task.op, task.shape, task.size) == {"rank_blocks": 1}
    assert pending([task], tmp_path, A10) == []
