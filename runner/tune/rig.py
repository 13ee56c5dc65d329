"""A few of the model's own layers, with random weights and adapters, and steps to time them by.

A configuration is judged by the time of the whole step. So what counts is also how well a kernel
shares the GPU with its neighbours.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from granatum.adapters_store.limits import padded_rank
from granatum.kernels.layout import KvLayout, make_query_tiles, make_tiles
from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M
from granatum.models.config import ModelConfig
from granatum.runner.adapters.images.layout import PIECE_STEP, padded
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.arena import Arena, allocate_table, page_tokens
from granatum.runner.model.decoder import Model
from granatum.runner.model.inputs import (
    QUERY_TILE_ROWS,
    DeviceInputs,
    Step,
    decode_shape,
    mixed_shape,
)
from granatum.runner.model.weights import random_weights
from granatum.runner.tune.tasks import USUAL_RANK, Task

CONTEXT = 512
"""Tokens of every sequence."""
PROMPT = 128
"""Rows of every prompt."""
MOST_ROWS = 2048
"""Rows of the largest step."""
SEQUENCES = 64
POOL_BYTES = 300 << 20
"""Weights of the layers, so that no L2 cache holds them."""
DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """One step to time: decodes of `rows` sequences, or prompts of `rows` rows in all.

    adapters: different ones; sequences take them in turn.
    """

    rows: int
    adapters: int
    rank: int
    prompts: bool


def loads(task: Task, max_rank: int) -> Iterator[Load]:
    """The steps that judge an entry: few and many adapters, of a usual rank and of the largest."""
    if task.rows is not None:
        yield Load(task.rows, task.rows, min(USUAL_RANK, max_rank), prompts=False)
        return
    steps = (
        ((512, 1), (MOST_ROWS, 1), (MOST_ROWS, 16)) if task.prompts else ((1, 1), (32, 1), (32, 32))
    )
    for rank in sorted({min(USUAL_RANK, max_rank), max_rank}):
        for rows, adapters in steps:
            yield Load(rows, adapters, rank, task.prompts)


class Rig:
    """Layers of `config` on `device`; their adapters have ranks up to `max_rank`."""

    def __init__(
        self,
        config: ModelConfig,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        weight = sum(k * sum(config.out_features[g]) for g, k in config.in_features.items())
        layers = min(max(2, math.ceil(POOL_BYTES / (2 * weight))), config.layers)
        self.config = replace(config, layers=layers, max_positions=CONTEXT)
        self.max_rank = padded_rank(max_rank)
        self._weights = random_weights(self.config, dtype, device)
        tokens = page_tokens(self.config, max_rank)
        self.limits = EngineLimits(SEQUENCES, 0, MOST_ROWS, tokens, CONTEXT, config.vocab)
        self._inputs = DeviceInputs(self.limits, device)
        self._table = allocate_table(self.config, SEQUENCES, torch.device("cpu"), self.max_rank)
        kv = KvLayout(tokens * self.config.kv_elements, tokens, config.kv_heads, config.head_dim)
        kv_pages = SEQUENCES * self.limits.pages_for(CONTEXT)
        elements = self._lay_out(kv_pages * kv.page_elements)
        pages = torch.empty(
            -(-elements // kv.page_elements), kv.page_elements, dtype=dtype, device=device
        )
        self._arena = Arena(pages.normal_(0.0, DEVIATION), kv)
        self._table = self._table.to(device)
        self._last = torch.zeros(SEQUENCES + 1, dtype=torch.int32, device=device)

    def model(self) -> Model:
        """The layers, as the tables now say that their kernels are cut."""
        return Model(self.config, self._weights, self._arena, self._table, self.limits)

    def forward(self, model: Model, step: Step) -> torch.Tensor:
        """Logits [samples, vocab] of a step."""
        return model.forward(step, self._last)

    def fill(self, load: Load) -> Step:
        """Make a step the content of the inputs."""
        self._table.rank.fill_(padded_rank(load.rank))
        step = self._fill_prompts(load) if load.prompts else self._fill_decodes(load)
        step.tokens.copy_(torch.arange(load.rows) * 7 % self.config.vocab)
        samples = step.shape.samples
        step.seats.copy_(torch.arange(samples))
        step.sample_rows.copy_((torch.arange(samples) + 1) * (load.rows // samples) - 1)
        pages = torch.arange(step.page_table.numel()).view(step.page_table.shape)
        step.page_table.copy_(pages)
        return step

    def _fill_decodes(self, load: Load) -> Step:
        step = self._inputs.view(decode_shape(load.rows, lora=True))
        step.lengths.fill_(CONTEXT)
        slots = sorted(row % load.adapters for row in range(load.rows))
        step.short_tiles.fill([(*t, 0) for t in make_tiles(slots, DECODE_BLOCK_M, base=True)])
        return step

    def _fill_prompts(self, load: Load) -> Step:
        count = load.rows // PROMPT
        step = self._inputs.view(mixed_shape(load.rows, 0, count, count, lora=True))
        rows = torch.arange(load.rows)
        step.positions.copy_(rows % PROMPT)
        tokens = self.limits.page_tokens
        first_page = rows // PROMPT * self.limits.pages_for(CONTEXT)
        step.kv_slots.copy_(first_page * tokens + rows % PROMPT)
        slots = [row // PROMPT % load.adapters for row in range(load.rows)]
        step.long_tiles.fill([(*t, 0) for t in make_tiles(slots, PREFILL_BLOCK_M, base=True)])
        chunks = [(n, n * PROMPT, PROMPT, 0) for n in range(count)]
        step.query_tiles.fill(make_query_tiles(chunks, QUERY_TILE_ROWS))
        return step

    def _lay_out(self, start: int) -> int:
        """Give every adapter its own place from element `start` on; where the last one ends."""
        table, rank, first = self._table, self.max_rank, 0
        table.scale.fill_(1.0)
        for group, (name, k) in enumerate(self.config.in_features.items()):
            outs = self.config.out_features[name]
            a, b = rank * k * len(outs), [rank * n for n in outs]
            for slot in range(SEQUENCES):
                for layer in range(self.config.layers):
                    table.a[slot, layer, group] = start
                    start += padded(a, PIECE_STEP)
                    for index, size in enumerate(b):
                        table.b[slot, layer, first + index] = start
                        start += padded(size, PIECE_STEP)
            first += len(outs)
        return start


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits differ by rounding alone; the order of sums depends on the configuration."""
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= 0.05 * expected.float().norm())


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; infinite if one is."""
    return math.exp(sum(map(math.log, values)) / len(values))
