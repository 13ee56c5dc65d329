"""The engine on a GPU, in CUDA graphs, against the torch twins on the CPU, in float32."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch

from granatum.examples.tasks import BASE, BASE_MODEL
from granatum.kernels.adapters import AdapterTable
from granatum.models.base_model import BaseModel
from granatum.models.config import ModelConfig
from granatum.models.rope import Rope
from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.images.image import ImageShape, random_image
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.execution.executor import Executor
from granatum.runner.engine.process import EngineOptions, build_engine
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.adapter_loader import AdapterLoader, MemoryImages
from granatum.runner.model.arena import Arena, allocate_arena, allocate_table, page_tokens
from granatum.runner.model.decoder import Model
from granatum.runner.model.weights import Weights, empty_weights, random_weights, targets
from granatum.runner.pages import PagePool
from granatum.runner.records import Sampling, SequenceNews, Submit

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from random_adapters import RandomAdapters
from random_engine import capture_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),  # the twins take minutes where other tests compile beside them
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CONFIG = ModelConfig(
    vocab=320, hidden=128, intermediate=192, layers=2, heads=8, kv_heads=2, head_dim=32,
    max_positions=512, rope=Rope(1e4), qk_norm=True, biased=frozenset({"qkv", "gate_up", "down"}),
)  # fmt: skip
ADAPTERS, PAGES, RANK = 5, 120, 16
LIMITS = EngineLimits(8, 100, 64, page_tokens(CONFIG, RANK), 400)
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.9, seed=3, top_p=0.9),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(temperature=1.2, top_k=20, min_p=0.02, seed=5, presence_penalty=0.4),
)


@dataclass
class Built:
    """An engine on one device, and all that it computes with."""

    device: torch.device
    arena: Arena
    table: AdapterTable
    adapters: RandomAdapters
    engine: Engine


def weights_on(device: torch.device) -> Weights:
    """The same random weights on every device."""
    weights = empty_weights(CONFIG, torch.float32, device)
    source = dict(targets(CONFIG, random_weights(CONFIG, torch.float32, torch.device("cpu"))))
    for name, tensor in targets(CONFIG, weights):
        tensor.copy_(source[name] * (1 if "norm" in name else 6))
    return weights


def build_with_loads(device: str, slots: int) -> tuple[Engine, AdapterLoader]:
    """An engine on which fewer adapters have room than there are."""
    on = torch.device(device)
    arena = allocate_arena(CONFIG, LIMITS.page_tokens, PAGES, torch.float32, on)
    table = allocate_table(CONFIG, slots, on, RANK)
    shape = ImageShape(base_model(), "float32", arena.kv.page_elements)
    images = {str(i): random_image(shape, RANK, seed=i) for i in range(ADAPTERS)}
    for image in images.values():
        np.multiply(image.pages, 5, out=image.pages)
    pages = sum(len(image.pages) for image in images.values())
    loader = AdapterLoader(arena.pages, table, MemoryImages(images), pages * shape.page_bytes)
    pool = PagePool(PAGES)
    executor = Executor(Model(CONFIG, weights_on(on), arena, table, LIMITS), LIMITS)
    engine = Engine(executor, LIMITS, pool, AdapterCache(pool, loader, slots))
    capture_all(engine)
    return engine, loader


def base_model() -> BaseModel:
    """CONFIG as adapters know it."""
    return BaseModel("test", CONFIG.layers, CONFIG.features, "f" * 64)


def build(device: str, like: Built | None = None) -> Built:
    """An engine with random weights and adapters; those of `like` if given."""
    on = torch.device(device)
    weights = weights_on(on)
    arena = allocate_arena(CONFIG, LIMITS.page_tokens, PAGES, torch.float32, on)
    table = allocate_table(CONFIG, ADAPTERS, on, RANK)
    pool = PagePool(PAGES)
    adapters = RandomAdapters(CONFIG, arena, table, pool, ADAPTERS)
    if like is not None:
        arena.pages.copy_(like.arena.pages)
    model = Model(CONFIG, weights, arena, table, LIMITS)
    engine = Engine(Executor(model, LIMITS), LIMITS, pool, adapters)
    capture_all(engine)
    return Built(on, arena, table, adapters, engine)


def run(engine: Engine, submits: list[Submit], gap: int) -> dict[int, list[int]]:
    """Tokens of each; one is submitted every `gap` steps, beside those that run already."""
    tokens: dict[int, list[int]] = {s.sequence_id: [] for s in submits}
    for news in news_of(engine, submits, gap):
        tokens[news.sequence_id] += news.tokens
    return tokens


def news_of(engine: Engine, submits: list[Submit], gap: int) -> Iterator[SequenceNews]:
    """All that is told of the same run."""
    left = list(submits)
    steps = 0
    while left or engine.busy:
        while left and (gap == 0 or steps % gap == 0):
            engine.submit(left.pop(0))
            if gap:
                break
        yield from engine.step()
        steps += 1


def crowd(sampled: bool) -> list[Submit]:
    generator = torch.Generator().manual_seed(9)
    submits = []
    for i in range(14):
        length = [1, 5, 33, 150][i % 4] + i
        prompt = tuple(torch.randint(0, CONFIG.vocab, (length,), generator=generator).tolist())
        sampling = SAMPLINGS[i % 4] if sampled else Sampling()
        adapter = None if i % 6 == 5 else str(i % ADAPTERS)
        submits.append(Submit(i, prompt, (), adapter, sampling, max_tokens=10 + 3 * i))
    return submits


@pytest.fixture(scope="module")
def pair() -> tuple[Built, Built]:
    on_cpu = build("cpu")
    return on_cpu, build("cuda", like=on_cpu)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("gap", [0, 3])
def test_graphs_give_the_tokens_of_the_twins(
    pair: tuple[Built, Built], sampled: bool, gap: int
) -> None:
    submits = crowd(sampled)
    on_cpu, on_gpu = (run(built.engine, submits, gap) for built in pair)
    assert on_gpu == on_cpu


@pytest.mark.parametrize("gap", [0, 3])
def test_given_tokens_take_the_place_of_drawn_ones(pair: tuple[Built, Built], gap: int) -> None:
    """Every other sequence is given random tokens; the others draw as if nobody were."""
    generator = torch.Generator().manual_seed(4)
    drawn = crowd(sampled=True)
    given = [
        replace(
            submit,
            sampling=Sampling(),
            top_logprobs=0,
            forced=tuple(
                torch.randint(0, CONFIG.vocab, (submit.max_tokens,), generator=generator).tolist()
            ),
        )
        for submit in drawn[::2]
    ]
    scores = []
    for built in pair:
        undisturbed = run(built.engine, drawn[1::2], gap)
        tokens = {submit.sequence_id: list[int]() for submit in drawn}
        values: list[tuple[int, float]] = []
        for news in news_of(built.engine, [*given, *drawn[1::2]], gap):
            tokens[news.sequence_id] += news.tokens
            values += [(news.sequence_id, entry.chosen) for entry in news.logprobs]
        assert all(tuple(tokens[s.sequence_id]) == s.forced for s in given)
        assert all(tokens[id_] == told for id_, told in undisturbed.items())
        values.sort(key=itemgetter(0))  # stable: a sequence's tokens stay in order
        scores.append(torch.tensor([value for _, value in values]))
    assert len(scores[0]) == sum(len(submit.forced) for submit in given)
    torch.testing.assert_close(scores[1], scores[0], atol=1e-3, rtol=0)


def test_alone_and_in_a_crowd(pair: tuple[Built, Built]) -> None:
    engine = pair[1].engine
    submits = crowd(sampled=True)
    together = run(engine, submits, 0)
    for submit in submits:
        assert run(engine, [submit], 0)[submit.sequence_id] == together[submit.sequence_id]


def test_adapters_come_and_go_between_steps() -> None:
    """A step that began before its adapter's copy ended would compute with another's."""
    found = []
    for device, slots in (("cpu", ADAPTERS), ("cuda", ADAPTERS), ("cuda", 2)):
        engine, loader = build_with_loads(device, slots)
        found.append([run(engine, crowd(sampled=False), gap) for gap in (0, 1)])
        assert engine.figures.adapter_loads > ADAPTERS or slots == ADAPTERS
        loader.close()
    assert found[1] == found[2] == found[0]


def test_the_engine_process_builds_on_a_gpu_without_a_number() -> None:
    options = EngineOptions(
        BASE_MODEL,
        "cuda",
        max_batch=4,
        prefill_tokens=64,
        arena_bytes=32 << 20,
        host_cache_bytes=8 << 20,
    )
    engine = build_engine(options, lambda _: MemoryImages({}))
    begin = 257
    word = tuple(BASE.prompt("granite").encode())
    tokens = run(engine, [Submit(0, (begin, *word), max_tokens=8)], 0)[0]
    assert bytes(tokens).decode() == BASE.expected("granite") + BASE.stop


def test_a_probe_leaves_no_trace(pair: tuple[Built, Built]) -> None:
    engine, arena = pair[1].engine, pair[1].arena
    before = arena.pages.clone()
    engine.probe()
    assert torch.equal(arena.pages, before)
