"""Finds how the linears of a decode step are best cut, by measuring the step.

    python benchmarks/step_tune.py --table kernels/h200_linear.json --models 7b,8b --batches 32

`linear_tune.py` measures a linear behind a small kernel. In a step, what matters as well is how
well it shares the GPU with the shrink beside it and with its neighbours. So this starts from the
table, and tries for each linear in turn other cuts in the real engine: a cut stays if a step with
an adapter of its own for every row and one with a single adapter take less time together. Prints
every trial and writes the table after each change; --seconds bounds a model's trials.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from decode import Adapters, Bench, adapters_of
from linear_tune import compile_tile, fits
from random_adapters import RandomAdapters
from workload import SHAPES

from granatum.kernels import linear
from granatum.kernels.layout import AdapterTable
from granatum.kernels.linear import Config, block_rows, shape_key
from granatum.runner import executor
from granatum.runner.arena import Arena, allocate_arena, page_tokens, pages_that_fit
from granatum.runner.config import GROUPS, ModelConfig
from granatum.runner.engine import Engine
from granatum.runner.inputs import StepShape, decode_shape, mixed_shape
from granatum.runner.model import Model
from granatum.runner.pages import PagePool
from granatum.runner.scheduler import Limits
from granatum.runner.weights import Weights, random_weights

Table = dict[str, Config | None]
POPULARITIES = ("distinct", "identical")
PROMPT, WINDOW, STEP_TOKENS = 512, 96, 512
RANK = 16
TILES = (
    Config(64, 128, 1, 4, 3),
    Config(64, 128, 1, 4, 4),
    Config(64, 128, 1, 4, 6),
    Config(64, 256, 1, 4, 2),
    Config(64, 256, 1, 4, 3),
    Config(128, 128, 1, 8, 3),
    Config(128, 128, 1, 8, 4),
)
FEWEST_BLOCKS = 128
"""Of a linear: with fewer, blocks share K."""
NOISE_MS = 0.01
"""By which a change must be better, of both steps together."""
_COMPILERS = 12


@dataclass
class Rig:
    """A model's weights and adapters on the GPU, for engines that differ in their cuts."""

    config: ModelConfig
    weights: Weights
    arena: Arena
    table: AdapterTable
    adapters: RandomAdapters
    pool: PagePool
    limits: Limits

    @classmethod
    def build(cls, config: ModelConfig, batch: int) -> "Rig":
        """With as many adapters as sequences."""
        device, dtype = torch.device("cuda"), torch.bfloat16
        tokens = page_tokens(config, RANK)
        limits = Limits(batch, 1 << 20, STEP_TOKENS, tokens, PROMPT + 4 * WINDOW)
        weights = random_weights(config, dtype, device)
        pages = pages_that_fit(tokens * config.kv_elements * dtype.itemsize, device, 0.8)
        arena = allocate_arena(config, tokens, pages, dtype, device)
        table, pool = AdapterTable.allocate(batch, config.layers, device, RANK), PagePool(pages)
        adapters = RandomAdapters(config, arena, table, pool, batch)
        return cls(config, weights, arena, table, adapters, pool, limits)

    def bench(self) -> Bench:
        """A new engine, which captures what the table says now."""
        gc.collect()
        model = Model(self.config, self.weights, self.arena, self.table, self.limits)
        runs = executor.Executor(model, self.limits)
        return Bench(Engine(runs, self.limits, self.pool, self.adapters), self.config.vocab)

    def step_ms(self, batch: int) -> list[float]:
        """Milliseconds of a step of each popularity, in a new engine."""
        bench = self.bench()
        return [_step_ms(bench, adapters_of(popularity, batch)) for popularity in POPULARITIES]


def _step_ms(bench: Bench, adapters: Adapters) -> float:
    batch = len(adapters)
    bench.submit([PROMPT] * batch, [4 * WINDOW] * batch, adapters)
    bench.settle(batch)
    began = time.perf_counter()
    for _ in range(WINDOW):
        bench.engine.step()
    took = time.perf_counter() - began
    bench.cancel(batch)
    return took / WINDOW * 1e3


def capture_only(batch: int) -> None:
    """Have engines capture no other steps than those measured here."""

    def shapes(limits: Limits) -> tuple[StepShape, ...]:
        mixed = mixed_shape(limits.step_tokens, batch, batch, batch, lora=True)
        return decode_shape(batch, lora=True), mixed

    executor._shapes = shapes  # noqa: SLF001


def use(table: Table) -> None:
    """Have `linear` look cuts up here."""
    linear._measured.cache_clear()  # noqa: SLF001
    found = {key: None if config is None else asdict(config) for key, config in table.items()}
    linear._table = lambda _name: found  # type: ignore[assignment] # noqa: SLF001


def read(path: Path) -> Table:
    """A table of `linear_tune.py`."""
    configs = json.loads(path.read_text())["configs"]
    return {key: config and Config(**config) for key, config in configs.items()}


def write(path: Path, table: Table) -> None:
    """As `linear_tune.py` does."""
    rows = (f"  {json.dumps(k)}: {json.dumps(c and asdict(c))}" for k, c in table.items())
    gpu, lines = torch.cuda.get_device_name(), ",\n".join(rows)
    path.write_text(f'{{"gpu": "{gpu}", "configs": {{\n{lines}\n}}}}\n')


def trials(in_features: int, out_features: int, rows: int) -> Iterator[Config | None]:
    """Other cuts of a linear, and the library's (None)."""
    yield None
    for tile in TILES:
        blocks = out_features // tile.block_n
        least = -(-FEWEST_BLOCKS // blocks)
        divides = out_features % tile.block_n == 0 and in_features % tile.block_k == 0
        for splits in (1,) if least == 1 else (least, least + 1):
            if divides and fits(tile, rows):
                yield replace(tile, splits=splits)


def tune(rig: Rig, batch: int, path: Path, seconds: float) -> None:
    """Try cuts linear by linear; the table at `path` has the best."""
    deadline, table, config = time.monotonic() + seconds, read(path), rig.config
    capture_only(batch)
    use(table)
    best = sum(rig.step_ms(batch))
    linears = [(g, config.in_features[g], sum(config.out_features[g])) for g in GROUPS]
    for name, k, n in (*linears, ("head", config.hidden, config.vocab)):
        key = shape_key(k, n, batch)
        kept = table.get(key)
        for trial in trials(k, n, block_rows(batch)):
            if trial == kept or time.monotonic() > deadline:
                continue
            use({**table, key: trial})
            times = rig.step_ms(batch)
            better = sum(times) < best - NOISE_MS
            print(f"{name:<8} {batch:>3} {[round(ms, 3) for ms in times]} {best / 2:.3f} {trial}"
                  f"{' *' if better else ''}", flush=True)  # fmt: skip
            if better:
                best, table[key] = sum(times), trial
                write(path, table)
        use(table)


def main() -> None:
    """Compile all cuts at once, then tune each model at each batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--models", default="7b,8b")
    parser.add_argument("--batches", default="32")
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    work = [(tile, block_rows(b)) for b in batches for tile in TILES if fits(tile, block_rows(b))]
    with ProcessPoolExecutor(_COMPILERS, mp_context=get_context("spawn")) as compilers:
        failures = [e for e in compilers.map(compile_tile, *zip(*work, strict=True)) if e]
    print(*failures, sep="\n")
    for model in args.models.split(","):
        for batch in batches:
            tune(Rig.build(SHAPES[model], batch), batch, args.table, args.seconds)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
