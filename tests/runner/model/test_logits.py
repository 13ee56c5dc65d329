"""Logits and log probabilities of a model in bfloat16: float32 from the head's sums on."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from granatum.models.config import ModelConfig
from granatum.models.rope import Rope
from granatum.runner.adapters.residency import NoAdapters
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.execution.executor import Executor
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.arena import allocate_arena, allocate_table, page_tokens
from granatum.runner.model.decoder import Model
from granatum.runner.model.weights import Weights, random_weights
from granatum.runner.pages import PagePool
from granatum.runner.records import Sampling, Submit, TokenLogprobs

PLAIN = ModelConfig(
    vocab=320, hidden=128, intermediate=192, layers=2, heads=4, kv_heads=2, head_dim=32,
    max_positions=256, rms_eps=1e-5, rope=Rope(1e4),
)  # fmt: skip
CONFIGS = {"llama": PLAIN, "granite": replace(PLAIN, logits_scaling=3.0)}
PROMPTS = 20
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, seed=1), Sampling(repetition_penalty=1.2))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(request.param)


class WatchedHead:
    """A head that keeps what it was given."""

    def __init__(self, head: Any) -> None:
        self.head = head
        self.hidden: list[torch.Tensor] = []

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.hidden.append(x.double().cpu())
        applied: torch.Tensor = self.head.apply(x, out)
        return applied


def weights_on(device: torch.device, config: ModelConfig) -> Weights:
    """Random weights in bfloat16, where the tokens of each pair have almost equal logits."""
    weights = random_weights(config, torch.bfloat16, device)
    head = weights.head.weight
    head *= 8
    head[1::2] = head[::2]
    head[1::2, :3] *= 1 + 2**-7
    return weights


def told(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, list[TokenLogprobs]]:
    """Of each token that an engine made, in turn: logits of float64, and what the engine said."""
    limits = EngineLimits(1, 0, 32, page_tokens(config, 8), 128, config.vocab)
    arena = allocate_arena(config, limits.page_tokens, 20, torch.bfloat16, device)
    weights = weights_on(device, config)
    model = Model(config, weights, arena, allocate_table(config, 1, device, 8), limits)
    executor = Executor(model, limits, graphs=False)
    watched: Any = WatchedHead(model._head)
    model._head = watched
    engine = Engine(executor, limits, PagePool(20), NoAdapters())
    said: list[TokenLogprobs] = []
    for number, sampling in product(range(PROMPTS), SAMPLINGS):
        prompt = (number, 300 - 11 * number)
        engine.submit(Submit(0, prompt, (), None, sampling, max_tokens=1, top_logprobs=4))
        while engine.busy:
            for news in engine.step():
                said += news.logprobs
    hidden = torch.cat(watched.hidden)
    return hidden @ weights.head.weight.double().cpu().T / config.logits_scaling, said


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probabilities_are_not_rounded_to_the_models_dtype(
    family: str, device: torch.device
) -> None:
    logits, said = told(CONFIGS[family], device)
    expected = logits.log_softmax(1)
    found = torch.tensor([[value for _, value in entry.top] for entry in said])
    ids = torch.tensor([[token for token, _ in entry.top] for entry in said])
    torch.testing.assert_close(found.double(), expected.gather(1, ids), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.double(), expected.topk(4).values, atol=1e-4, rtol=0)
    assert float((found.bfloat16().float() == found).float().mean()) < 0.05


def test_the_likeliest_token_is_found_where_bfloat16_sees_a_tie(device: torch.device) -> None:
    logits, said = told(PLAIN, device)
    greedy = slice(0, None, len(SAMPLINGS))
    assert [entry.chosen for entry in said[greedy]] == [e.top[0][1] for e in said[greedy]]
    chosen = torch.tensor([entry.top[0][0] for entry in said[greedy]])[:, None]
    logits = logits[greedy]
    assert (logits.gather(1, chosen) > logits.amax(1, keepdim=True) - 1e-5).all()
    assert not logits.bfloat16().argmax(1, keepdim=True).equal(chosen), "no tie was shown"
