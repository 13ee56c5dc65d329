"""How long an engine's longest step takes, which says how long it may be silent."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import TinyEngine, make_model

from granatum.runner.records import Submit


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TinyEngine]:
    make_model(tmp_path, "llama_gqa_tied")
    engine = TinyEngine(tmp_path, max_rank=8)
    yield engine
    engine.close()


def test_attention_at_the_end_of_the_longest_context_counts(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []

    def attend(rows: int, length: int) -> None:
        measured.append((rows, length))
        time.sleep(0.05)

    monkeypatch.setattr(engine.model, "attend_far", attend)
    step_s = engine.engine._executor.measure()
    assert measured == [(64, 512)]
    assert step_s >= engine.model.config.layers * 0.05


@pytest.mark.parametrize(("rows", "length"), [(64, 512), (512, 512), (64, 33), (1, 1)])
def test_measuring_attention_changes_nothing(engine: TinyEngine, rows: int, length: int) -> None:
    before = engine.model._arena.pages.clone()
    engine.model.attend_far(rows, length)
    assert engine.model._arena.pages.equal(before)
    assert engine.run(Submit(1, (4, 5), max_tokens=3))[1].outcome is not None
