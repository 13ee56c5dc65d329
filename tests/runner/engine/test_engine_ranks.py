"""Engines whose largest rank is no multiple of what adapters' ranks are rounded up to."""

from pathlib import Path

import pytest
from tiny_models import make_model

from granatum.runner.adapters.images.image import ImageShape, random_image
from granatum.runner.engine.process import EngineOptions, build_engine
from granatum.runner.model.adapter_loader import MemoryImages
from granatum.runner.records import Submit

ADAPTER = "ab" * 32


def tokens_of(model: Path, max_rank: int, rank: int) -> list[int]:
    """What an engine of `max_rank` generates with an adapter of `rank` on every projection."""

    def open_source(shape: ImageShape) -> MemoryImages:
        assert shape.max_rank == max_rank
        image = random_image(shape, rank, seed=1)
        image.row.scale[...] = 40
        return MemoryImages({ADAPTER: image})

    options = EngineOptions(
        model, "cpu", max_batch=4, prefill_tokens=32, max_rank=max_rank, arena_bytes=8 << 20,
        host_cache_bytes=8 << 20,
    )  # fmt: skip
    engine = build_engine(options, open_source)
    engine.submit(Submit(1, tuple(range(1, 12)), adapter=ADAPTER, max_tokens=16))
    tokens: list[int] = []
    while engine.busy:
        for news in engine.step():
            tokens += news.tokens
    return tokens


@pytest.mark.parametrize("rank", [1, 5, 13])
def test_adapters_of_the_largest_rank_are_served_whole(tmp_path: Path, rank: int) -> None:
    make_model(tmp_path, "llama_mha")
    found = tokens_of(tmp_path, rank, rank)
    assert len(found) == 16
    assert found == tokens_of(tmp_path, -(-rank // 8) * 8, rank)
