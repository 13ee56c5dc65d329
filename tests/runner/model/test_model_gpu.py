"""Steps with prompts in bfloat16, whose kernels are others than float32's, near the CPU's twins."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from granatum.kernels.lora import ops as lora
from granatum.models.config import ModelConfig
from granatum.models.rope import Rope
from granatum.models.scalings import Yarn
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan, Span
from granatum.runner.engine.scheduling.sequence import Sequence
from granatum.runner.model.arena import allocate_arena, allocate_table, page_tokens
from granatum.runner.model.decoder import Model
from granatum.runner.model.inputs import DeviceInputs, HostInputs, mixed_shape
from granatum.runner.model.weights import empty_weights, random_weights, targets
from granatum.runner.pages import PagePool
from granatum.runner.records import Submit

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from random_adapters import RandomAdapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

ADAPTERS, PAGES = 3, 120
SLOTS_AND_ROWS = ((0, 100), (-1, 30), (2, 129), (1, 64), (0, 3))
"""Of each prompt: its adapter, or none, and its length."""


PLAIN = ModelConfig(
    vocab=320, hidden=256, intermediate=384, layers=2, heads=2, kv_heads=2, head_dim=128,
    max_positions=512, rms_eps=1e-5, rope=Rope(1e4),
)  # fmt: skip
CONFIGS = {
    "llama": PLAIN,
    "qwen": replace(PLAIN, kv_heads=1, qk_norm=True, biased=frozenset({"qkv"})),
    "biases and yarn": replace(
        PLAIN,
        biased=frozenset({"qkv", "o", "gate_up", "down"}),
        rope=Rope(1e4, Yarn(4.0, 1.14, 32.0, 1.0, True, 128)),
    ),
    "granite": replace(
        PLAIN,
        embedding_multiplier=3.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        logits_scaling=3.0,
    ),
}


def prompts_logits(
    model_config: ModelConfig, rank: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Logits after each prompt, of numbers that bfloat16 holds."""
    limits = EngineLimits(8, 0, 512, page_tokens(model_config, rank), 400)
    weights = empty_weights(model_config, dtype, device)
    drawn = random_weights(model_config, torch.float32, torch.device("cpu"))
    source = dict(targets(model_config, drawn))
    for name, tensor in targets(model_config, weights):
        tensor.copy_((source[name] * (1 if "norm" in name else 3)).bfloat16())
    arena = allocate_arena(model_config, limits.page_tokens, PAGES, dtype, device)
    table = allocate_table(model_config, ADAPTERS, device, rank)
    pool = PagePool(PAGES)
    RandomAdapters(model_config, arena, table, pool, ADAPTERS)
    generator = torch.Generator().manual_seed(1)
    arena.pages.copy_((0.1 * torch.randn(arena.pages.shape, generator=generator)).bfloat16())

    spans = []
    for seat, (slot, rows) in enumerate(SLOTS_AND_ROWS):
        tokens = torch.randint(0, model_config.vocab, (rows,), generator=generator).tolist()
        pages = pool.allocate(limits.pages_for(rows))
        assert pages is not None
        submit = Submit(seat, tuple(tokens))
        sequence = Sequence(submit, seat, rows + 8, tokens, list(pages), seat=seat, slot=slot)
        spans.append(Span(sequence, 0, rows, samples=True, fed=False))
    plan = Plan((), tuple(spans))
    shape = mixed_shape(512, 0, 8, 8, lora=True)
    assert shape.long_tiles
    host, inputs = HostInputs(limits, pinned=False), DeviceInputs(limits, device)
    inputs.copy(host, host.fill(plan, shape, sampling=False))
    model = Model(model_config, weights, arena, table, limits)
    last = torch.zeros(limits.max_batch + 1, dtype=torch.int32, device=device)
    return model.forward(inputs.view(shape), last)[: len(spans)].float().cpu()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rank", [16, 40])
@pytest.mark.parametrize("many", [False, True])
def test_prompts_in_bfloat16(
    family: str, rank: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MANY_ROWS", 1 if many else 1 << 20)
    made = CONFIGS[family]
    expected = prompts_logits(made, rank, torch.float32, torch.device("cpu"))
    found = prompts_logits(made, rank, torch.bfloat16, torch.device("cuda"))
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 0.06, errors
