"""What there is to measure of a model on a GPU: shapes, and the configurations to try for each.

A configuration is given as in the tables: by what differs from the default, None for the default.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from granatum.adapters_store.limits import padded_rank
from granatum.kernels.device import Gpu
from granatum.kernels.linear import tuning as linear
from granatum.kernels.lora import tuning as lora
from granatum.kernels.tables import tables
from granatum.kernels.tables.tables import Differences
from granatum.models.config import ModelConfig

USUAL_RANK = 16
"""The rank that most adapters have; steps are measured with adapters of this rank as well."""
FIELDS = {lora.OP: lora.FIELDS, linear.OP: linear.FIELDS}
"""The ops that have tables, and the fields of their configurations."""
LINEAR_TILES = (
    linear.Config(64, 64, 1, 4, 5),
    linear.Config(64, 64, 1, 4, 8),
    linear.Config(64, 128, 1, 4, 2),
    linear.Config(64, 128, 1, 4, 3),
    linear.Config(64, 128, 1, 4, 4),
    linear.Config(64, 128, 1, 4, 6),
    linear.Config(64, 256, 1, 4, 2),
    linear.Config(64, 256, 1, 4, 3),
    linear.Config(128, 64, 1, 4, 4),
    linear.Config(128, 64, 1, 4, 6),
    linear.Config(128, 128, 1, 8, 3),
    linear.Config(128, 128, 1, 8, 4),
)
SPLITS = (1, 2, 3, 4, 6)
FEWEST_PER_SM, MOST_PER_SM = 0.7, 7
"""Blocks per multiprocessor between which splits of K are tried; one split may make more blocks."""
_BYTES = 2
"""Of a value; 16-bit types are measured."""

Choice = Differences | None
Phase = Callable[[Choice], Iterator[Choice]]
"""What to try, given the best configuration so far."""


@dataclass(frozen=True, slots=True)
class Task:
    """One entry of a table.

    prompts: whether steps with prompts show its time, or else steps of decodes;
    rows:    decodes of such a step, for a linear, which is cut by its rows; None: several steps.
    """

    op: str
    shape: str
    size: int
    prompts: bool
    rows: int | None
    phases: tuple[Phase, ...]


def tasks(config: ModelConfig, max_rank: int, gpu: Gpu) -> list[Task]:
    """Every entry that a runner of this model looks up, each once."""
    found = [_lora_task(shape, gpu) for shape in lora_shapes(config, max_rank)]
    for rows in linear.ROWS:
        found += [_linear_task(k, n, rows, gpu) for k, n in linear_shapes(config)]
    return found


def unmeasured(config: ModelConfig, max_rank: int, gpu: Gpu) -> list[str]:
    """The shapes of a model that were never measured on a GPU, at any size."""
    lora_keys = dict.fromkeys(shape.key for shape in lora_shapes(config, max_rank))
    keys = [(lora.OP, key) for key in lora_keys]
    keys += [(linear.OP, linear.shape_key(k, n)) for k, n in linear_shapes(config)]
    return [f"{op} {key}" for op, key in keys if not tables.is_measured(gpu, op, key)]


def lora_shapes(config: ModelConfig, max_rank: int) -> list[lora.Shape]:
    """What LoRA's configurations depend on: each group's fused linear, by rows and by tiles."""
    rank = padded_rank(max_rank)
    shapes = (
        lora.Shape(config.in_features[group], config.out_features[group], rank, block_m)
        for group, block_m in product(
            config.in_features, (lora.DECODE_BLOCK_M, lora.PREFILL_BLOCK_M)
        )
    )
    return list(dict.fromkeys(shapes))


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Input and output features of each fused linear, and of the output projection."""
    shapes = [(k, sum(config.out_features[group])) for group, k in config.in_features.items()]
    return list(dict.fromkeys((*shapes, (config.hidden, config.vocab))))


def _lora_task(shape: lora.Shape, gpu: Gpu) -> Task:
    default = lora.default_config(shape, pdl=gpu.overlaps)

    def phase(changes: Callable[[lora.Shape], Iterator[dict[str, int | bool]]]) -> Phase:
        def tried(best: Choice) -> Iterator[Choice]:
            for change in changes(shape):
                config = replace(default, **{**(best or {}), **change})
                if _shrink_bytes(shape, config) <= gpu.shared_memory:
                    yield _differences(default, config)

        return tried

    phases = [phase(_shrinks), phase(_expands)]
    if gpu.overlaps:
        phases.append(phase(_apart))
    return Task(lora.OP, shape.key, shape.max_rank, shape.dot, None, tuple(phases))


def _differences(default: lora.Config, config: lora.Config) -> Choice:
    plain = asdict(default)
    return {f: value for f, value in asdict(config).items() if plain[f] != value} or None


def _shrinks(shape: lora.Shape) -> Iterator[dict[str, int | bool]]:
    """Rank blocks of 16 that serve usual ranks at once: spare blocks cost more than a short loop,
    and a long loop costs more than spare blocks."""
    projections = len(shape.out_features)
    if not shape.dot:
        for chunk, ranks in product((256, 512), (16, 32, 64, 128)):
            if ranks == USUAL_RANK or ranks <= shape.max_rank // 2:
                blocks = projections * ranks // 16
                yield {"chunk_k": chunk, "shrink_k": chunk, "rank_blocks": blocks}
        return
    k = shape.in_features
    chunks = sorted({c for c in (512, 1024, 2048, k // 2) if k // 8 <= c <= k and c % 128 == 0})
    for chunk, ranks, blocks in product(chunks, (16, 32, 64), (1, 2, 4)):
        if USUAL_RANK * projections <= ranks * blocks <= max(64, projections * shape.max_rank):
            yield {"chunk_k": chunk, "shrink_k": 128, "shrink_r": ranks, "rank_blocks": blocks}


def _expands(shape: lora.Shape) -> Iterator[dict[str, int | bool]]:
    for span in (256, 512, 1024) if shape.dot else (128, 256):
        if shape.dot:
            yield {"expand_n": 128, "expand_span": span, "silu_n": span}
        else:
            yield {"expand_n": span, "expand_span": span, "silu_n": span}


def _apart(_shape: lora.Shape) -> Iterator[dict[str, int | bool]]:
    """Without overlap of launches."""
    yield {"pdl": False}


def _shrink_bytes(shape: lora.Shape, config: lora.Config) -> int:
    """Shared memory of a shrink's block: tiles of x and of A, as many as are loaded ahead."""
    if not shape.dot:
        return 0
    return _BYTES * config.shrink_stages * config.shrink_k * (shape.block_m + config.shrink_r)


def _linear_task(in_features: int, out_features: int, rows: int, gpu: Gpu) -> Task:
    def tried(_best: Choice) -> Iterator[Choice]:
        for tile in LINEAR_TILES:
            divides = out_features % tile.block_n == in_features % tile.block_k == 0
            if divides and linear_bytes(tile, rows) <= gpu.shared_memory:
                blocks = out_features // tile.block_n
                for splits in SPLITS:
                    per_sm = blocks * splits / gpu.sms
                    if per_sm >= FEWEST_PER_SM and (per_sm <= MOST_PER_SM or splits == 1):
                        yield asdict(replace(tile, splits=splits))

    shape = linear.shape_key(in_features, out_features)
    return Task(linear.OP, shape, rows, False, rows, (tried,))


def linear_bytes(tile: linear.Config, rows: int) -> int:
    """Shared memory of a linear's block: tiles of W and of x, as many as are loaded ahead."""
    return _BYTES * tile.stages * tile.block_k * (tile.block_n + rows)
