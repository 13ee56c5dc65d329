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
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from decode import Rig, adapters_of, step_ms
from linear_tune import compile_tile, fits, write_table
from workload import SHAPES

from granatum.kernels.linear import linear
from granatum.kernels.linear.linear import Config, block_rows, shape_key
from granatum.models.families import LLAMA
from granatum.runner.engine.execution import executor
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.inputs import StepShape, decode_shape, mixed_shape

Table = dict[str, Config | None]
POPULARITIES = ("distinct", "identical")
PROMPT, PREFILL_TOKENS = 512, 512
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


def both_ms(rig: Rig, batch: int) -> list[float]:
    """Milliseconds of a step of each popularity, in a new engine."""
    gc.collect()  # the engine before this one and its graphs
    bench, prompts = rig.bench(), [PROMPT] * batch
    return [step_ms(bench, adapters_of(p, batch), prompts, 1)["step_ms"] for p in POPULARITIES]


def capture_only(batch: int) -> None:
    """Have engines capture no other steps than those measured here."""

    def shapes(limits: EngineLimits) -> tuple[StepShape, ...]:
        mixed = mixed_shape(limits.prefill_tokens, batch, batch, batch, lora=True)
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


def tune(rig: Rig, batch: int, path: Path, names: list[str], seconds: float) -> None:
    """Try cuts of the linears named, one by one; the table at `path` has the best."""
    deadline, table, config = time.monotonic() + seconds, read(path), rig.config
    capture_only(batch)
    use(table)
    best = sum(both_ms(rig, batch))
    linears = [(g, k, sum(config.out_features[g])) for g, k in config.in_features.items()]
    for name, k, n in (*linears, ("head", config.hidden, config.vocab)):
        if name not in names:
            continue
        key = shape_key(k, n, batch)
        kept = table.get(key)
        for trial in trials(k, n, block_rows(batch)):
            if trial == kept or time.monotonic() > deadline:
                continue
            use({**table, key: trial})
            times = both_ms(rig, batch)
            better = sum(times) < best - NOISE_MS
            print(f"{name:<8} {batch:>3} {[round(ms, 3) for ms in times]} {best / 2:.3f} {trial}"
                  f"{' *' if better else ''}", flush=True)  # fmt: skip
            if better:
                best, table[key] = sum(times), trial
                write_table(path, table)
        use(table)


def main() -> None:
    """Compile all cuts at once, then tune each model at each batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--models", default="7b,8b")
    parser.add_argument("--batches", default="32")
    parser.add_argument(
        "--linears", default=",".join((*(group.name for group in LLAMA.groups), "head"))
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    work = [(tile, block_rows(b)) for b in batches for tile in TILES if fits(tile, block_rows(b))]
    with ProcessPoolExecutor(_COMPILERS, mp_context=get_context("spawn")) as compilers:
        failures = [e for e in compilers.map(compile_tile, *zip(*work, strict=True)) if e]
    print(*failures, sep="\n")
    for model in args.models.split(","):
        for batch in batches:
            rig = Rig.build(SHAPES[model], batch, rank=RANK, prefill_tokens=PREFILL_TOKENS,
                            context=PROMPT, device=torch.device("cuda"))  # fmt: skip
            tune(rig, batch, args.table, args.linears.split(","), args.seconds)
            del rig
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
