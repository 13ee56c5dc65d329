"""Hostile numbers on a GPU, in CUDA graphs, beside neighbours of whose bits none may change."""

import os
import sys
from pathlib import Path

import pytest
import torch

from granatum.models.config import ModelConfig
from granatum.models.rope import Rope
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.execution.executor import Executor
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.arena import allocate_arena, allocate_table, page_tokens
from granatum.runner.model.decoder import Model
from granatum.runner.model.weights import random_weights, targets
from granatum.runner.pages import PagePool
from granatum.runner.records import (
    Failure,
    Finish,
    Sampling,
    SequenceNews,
    Submit,
    TokenLogprobs,
)

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from random_adapters import RandomAdapters
from random_engine import capture_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

RANK, ADAPTERS, PAGES = 16, 3, 120
HUGE = 1
"""The adapter whose values overflow."""
CONFIGS = {
    "grouped": ModelConfig(
        vocab=320, hidden=256, intermediate=256, layers=2, heads=8, kv_heads=2, head_dim=128,
        max_positions=512, rope=Rope(1e4), qk_norm=True, biased=frozenset({"qkv"}),
    ),
    "single": ModelConfig(
        vocab=320, hidden=256, intermediate=256, layers=2, heads=2, kv_heads=2, head_dim=128,
        max_positions=512, rope=Rope(1e4), qk_norm=False, biased=frozenset(),
    ),
}  # fmt: skip


class Bed:
    """An engine in bfloat16, whose arena held no numbers before; adapter `HUGE` is of 1e30."""

    def __init__(self, config: ModelConfig) -> None:
        device = torch.device("cuda")
        tokens = page_tokens(config, RANK)
        limits = EngineLimits(8, 100, 64, tokens, 400, config.vocab)
        weights = random_weights(config, torch.bfloat16, device)
        for name, tensor in targets(config, weights):
            tensor.mul_(1 if "norm" in name else 6)
        arena = allocate_arena(config, tokens, PAGES, torch.bfloat16, device)
        arena.pages.fill_(torch.nan)
        table = allocate_table(config, ADAPTERS, device, RANK)
        self.pool = PagePool(PAGES)
        adapters = RandomAdapters(config, arena, table, self.pool, ADAPTERS)
        for offset in (*table.a[HUGE].flatten().tolist(), *table.b[HUGE].flatten().tolist()):
            arena.pages[offset // arena.kv.page_elements].fill_(1e30)
        graphs = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ  # a capture needs the cache
        executor = Executor(Model(config, weights, arena, table, limits), limits, graphs=graphs)
        self.engine = Engine(executor, limits, self.pool, adapters)
        capture_all(self.engine)

    def run(self, *submits: Submit) -> dict[int, list[SequenceNews]]:
        """What each is told."""
        told: dict[int, list[SequenceNews]] = {s.sequence_id: [] for s in submits}
        for submit in submits:
            self.engine.submit(submit)
        while self.engine.busy:
            for news in self.engine.step():
                told[news.sequence_id].append(news)
        return told


def innocent(vocab: int) -> list[Submit]:
    """Greedy and sampled, short and long, of the base model and of two adapters."""
    samplings = (Sampling(), Sampling(temperature=0.9, seed=3, top_p=0.9, frequency_penalty=0.2))
    return [
        Submit(
            i,
            (vocab - 1, 0, *((7 * i + t) % vocab for t in range(25 * i))),
            adapter=(None, "0", "2")[i % 3],
            sampling=samplings[i % 2],
            max_tokens=20 + 3 * i,
            top_logprobs=4,
        )
        for i in range(5)
    ]


def hostile(vocab: int) -> list[Submit]:
    """Each ends with its first token; sampled, greedy, by penalties, with every token masked."""
    every = tuple(range(vocab))
    return [
        Submit(90, (5,) * 70, adapter=str(HUGE), max_tokens=9),
        Submit(91, (5, 6), adapter=str(HUGE), sampling=Sampling(temperature=1.0), max_tokens=9),
        Submit(92, every, sampling=Sampling(repetition_penalty=1e-40), max_tokens=9),
    ]


def heard(news: list[SequenceNews]) -> tuple[list[int], list[TokenLogprobs]]:
    return [t for n in news for t in n.tokens], [p for n in news for p in n.logprobs]


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_sequences_end_and_their_neighbours_bits_stay(name: str) -> None:
    vocab = CONFIGS[name].vocab
    bed = Bed(CONFIGS[name])
    # Harmless ones of the same shapes stand in for the hostile, so that all steps run the same
    # graphs. Of a hostile one, too, a second step is computed, before its first is collected.
    company = [
        Submit(90 + i, s.prompt, adapter=s.adapter and "0", max_tokens=2)
        for i, s in enumerate(hostile(vocab))
    ]
    undisturbed = bed.run(*innocent(vocab), *company)
    for _ in range(2):  # the second time in pages and seats that the hostile have had
        told = bed.run(*innocent(vocab), *hostile(vocab))
        for submit in hostile(vocab):
            (news,) = told[submit.sequence_id]
            assert isinstance(news.outcome, Failure)
            assert news.outcome.reason == "LOGITS_NOT_FINITE"
        for submit in innocent(vocab):
            i = submit.sequence_id
            assert told[i][-1].outcome is Finish.LENGTH
            assert heard(told[i]) == heard(undisturbed[i])


def test_ids_at_the_vocabularys_edge_and_hostile_stop_ids() -> None:
    config = CONFIGS["grouped"]
    edge = config.vocab - 1
    bed = Bed(config)
    told = bed.run(
        Submit(1, (edge, edge), max_tokens=5, min_tokens=5, stop_ids=frozenset({edge, 4 << 30})),
        Submit(2, (edge + 1,), max_tokens=5),
        Submit(3, (1,), max_tokens=9, min_tokens=3, stop_ids=frozenset(range(config.vocab))),
        Submit(4, (2,), sampling=Sampling(temperature=1e-39, seed=4), max_tokens=5),
    )
    assert edge not in heard(told[1])[0][:4]
    assert len(heard(told[4])[0]) == 5
    for i, reason in ((2, "TOKEN_ID"), (3, "LOGITS_NOT_FINITE")):
        outcome = told[i][-1].outcome
        assert isinstance(outcome, Failure)
        assert outcome.reason == reason
