"""Decoding with an adapter per request, in the real engine, with random weights.

    python benchmarks/decode.py --models 7b,8b --out benchmarks/results/h200/decode.json

* step_ms: milliseconds from step to step while `batch` sequences decode, over 128 steps from a
  context of about 528 tokens to 656; median of `--repeats` after a discarded one. With
  --contexts running: from contexts as unlike as those of text generation's requests are.
* prompt_ms: milliseconds from the launch to the end of a step that computes the rows of a prompt
  (--prompts), alone, and beside decodes of all other sequences of a batch with adapters alike.
* --profile: where one step's time goes on the GPU, by kernel, and for how long it is idle.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import results
import torch
from random_adapters import RandomAdapters
from random_engine import capture_all
from results import Results, Row
from traffic import BACKBONE
from workload import (
    MAX_LENGTH,
    POPULARITIES,
    SHAPES,
    adapter_ids,
    running_lengths,
)

from granatum.kernels.adapters import AdapterTable
from granatum.models.config import ModelConfig
from granatum.runner.engine.engine import Engine
from granatum.runner.engine.execution.executor import Executor
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.arena import (
    Arena,
    allocate_arena,
    allocate_table,
    page_tokens,
    pages_that_fit,
)
from granatum.runner.model.decoder import Model
from granatum.runner.model.weights import Weights, random_weights
from granatum.runner.pages import PagePool
from granatum.runner.records import Submit

Adapters = list[str | None]
WINDOW = 128
"""Steps over which a step is timed."""
CONTEXTS = ("equal", "running")
SETTLE = 16
"""Tokens that every sequence makes before that."""


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine and its model's vocabulary."""

    engine: Engine
    vocab: int

    def submit(self, prompts: list[int], outputs: list[int], adapters: Adapters) -> None:
        """Requests of `prompts[i]` random tokens that make `outputs[i]` with `adapters[i]`."""
        rng = np.random.default_rng(0)
        for i, (prompt, tokens, adapter) in enumerate(zip(prompts, outputs, adapters, strict=True)):
            ids = tuple(rng.integers(3, self.vocab, prompt).tolist())
            self.engine.submit(Submit(i, ids, adapter=adapter, max_tokens=tokens))

    def run(self) -> int:
        """Steps until nothing is left; tokens made."""
        made = 0
        while self.engine.busy:
            made += sum(len(news.tokens) for news in self.engine.step())
        return made

    def settle(self, sequences: int) -> None:
        """Step until every sequence has made `SETTLE` tokens."""
        made = dict.fromkeys(range(sequences), 0)
        while min(made.values()) < SETTLE:
            for news in self.engine.step():
                made[news.sequence_id] += len(news.tokens)

    def cancel(self, sequences: int) -> None:
        """End every sequence."""
        for i in range(sequences):
            self.engine.cancel(i)
        self.run()


@dataclass(frozen=True, slots=True)
class Rig:
    """A model's random weights and adapters on a device, for engines one after another."""

    config: ModelConfig
    weights: Weights
    arena: Arena
    table: AdapterTable
    adapters: RandomAdapters
    pool: PagePool
    limits: EngineLimits

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        batch: int,
        *,
        rank: int,
        prefill_tokens: int,
        context: int,
        device: torch.device,
        pages: int | None = None,
    ) -> "Rig":
        """For `batch` sequences and adapters; with as many pages as fit, unless told."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weights = random_weights(config, dtype, device)
        tokens = page_tokens(config, rank)
        limits = EngineLimits(
            max_batch=batch,
            max_waiting=1 << 20,
            prefill_tokens=max(prefill_tokens, batch),
            page_tokens=tokens,
            max_context=max(context, MAX_LENGTH) + SETTLE + WINDOW + 2 * batch + 64,
        )
        page_bytes = tokens * config.kv_elements * dtype.itemsize
        pages = pages or pages_that_fit(page_bytes, device, 0.9)
        arena = allocate_arena(config, tokens, pages, dtype, device)
        table = allocate_table(config, batch, device, rank)
        pool = PagePool(pages)
        adapters = RandomAdapters(config, arena, table, pool, batch)
        return cls(config, weights, arena, table, adapters, pool, limits)

    def bench(self) -> Bench:
        """A new engine, once it has captured all graphs."""
        started = time.perf_counter()
        model = Model(self.config, self.weights, self.arena, self.table, self.limits)
        engine = Engine(Executor(model, self.limits), self.limits, self.pool, self.adapters)
        capture_all(engine)
        seconds = time.perf_counter() - started
        print(f"engine ready in {seconds:.1f} s, {self.pool.total} pages", flush=True)
        return Bench(engine, self.config.vocab)


def adapters_of(popularity: str, batch: int) -> Adapters:
    """The digest of each sequence's adapter."""
    if popularity == BACKBONE:
        return [None] * batch
    return [str(i) for i in adapter_ids(popularity, batch)]


def prompts_of(contexts: str, batch: int, context: int) -> list[int]:
    """Tokens of each sequence's prompt."""
    return running_lengths(batch) if contexts == "running" else [context] * batch


def step_ms(bench: Bench, adapters: Adapters, prompts: list[int], repeats: int) -> dict[str, float]:
    """The time from step to step, median over windows, and that of the slowest steps."""
    batch = len(adapters)
    means, slow = [], []
    for _ in range(1 + repeats):
        outputs = [SETTLE + WINDOW + 2 * batch + 64] * batch
        bench.submit(prompts, outputs, adapters)
        bench.settle(batch)
        times = [time.perf_counter()]
        for _ in range(WINDOW):
            news = bench.engine.step()
            assert len(news) == batch
            times.append(time.perf_counter())
        bench.cancel(batch)
        means.append((times[-1] - times[0]) / WINDOW * 1e3)
        slow.append(float(np.quantile(np.diff(times), 0.99)) * 1e3)
    return {
        "step_ms": round(statistics.median(means[1:]), 3),
        "p99_ms": round(statistics.median(slow[1:]), 3),
    }


def prompt_ms(bench: Bench, adapters: Adapters, context: int, prompt: int, trials: int) -> float:
    """The median time of a step with a prompt for the last adapter; the others decode beside it."""
    *beside, own = adapters
    rng, times = np.random.default_rng(1), []
    bench.submit([context] * len(beside), [SETTLE + WINDOW + 64] * len(beside), beside)
    if beside:
        bench.settle(len(beside))
    for trial in range(-2, trials):
        ids = tuple(rng.integers(3, bench.vocab, prompt).tolist())
        bench.engine.submit(Submit(len(adapters) + 2 + trial, ids, adapter=own, max_tokens=2))
        _synchronize()
        began = time.perf_counter()
        bench.engine.step()
        _synchronize()
        times.append((time.perf_counter() - began) * 1e3)
        for _ in range(4):  # until its tokens are made
            bench.engine.step()
    bench.cancel(len(beside))
    return round(statistics.median(times[2:]), 3)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(bench: Bench, adapters: Adapters, prompts: list[int]) -> dict[str, Any]:
    """GPU milliseconds per step by kernel, and the share of time in which no kernel ran."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    batch, steps = len(adapters), 20
    bench.submit(prompts, [SETTLE + 4 * WINDOW] * batch, adapters)
    bench.settle(batch)
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            bench.engine.step()
        torch.cuda.synchronize()
    bench.cancel(batch)
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events()
        if e.device_type.name == "CUDA"
    )
    by_name: dict[str, float] = {}
    busy, reached = 0.0, spans[0][0]
    for start, end, name in spans:
        by_name[name] = by_name.get(name, 0.0) + (end - start)
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    parts = sorted(by_name.items(), key=lambda item: -item[1])[:40]
    return {
        "idle": round(1 - busy / (reached - spans[0][0]), 4),
        "step_ms": round((reached - spans[0][0]) / steps / 1e3, 3),
        "kernels_ms": {name[:100]: round(us / steps / 1e3, 4) for name, us in parts},
    }


def bench_model(args: argparse.Namespace, name: str) -> Iterator[Row]:
    """Every row of one model."""
    bench = Rig.build(
        SHAPES[name],
        args.max_batch,
        rank=args.rank,
        prefill_tokens=args.prefill_tokens,
        context=args.context,
        device=torch.device(args.device),
        pages=args.pages,
    ).bench()
    for popularity in args.popularities:
        rank = 0 if popularity == BACKBONE else args.rank
        for batch, contexts in product(args.batches, args.contexts):
            adapters = adapters_of(popularity, batch)
            prompts = prompts_of(contexts, batch, args.context)
            common: Row = {"model": name, "popularity": popularity, "rank": rank, "batch": batch}
            common["context"] = "running" if contexts == "running" else args.context
            row: Row = {"scenario": "step", **common}
            row |= step_ms(bench, adapters, prompts, args.repeats)
            yield {**row, "tokens_per_s": round(batch / row["step_ms"] * 1e3, 1)}
            if args.profile:
                row = {"scenario": "profile", **common}
                yield {**row, **profile(bench, adapters, prompts)}
        for prompt, batch in product(args.prompts, (1, max(args.batches))):
            adapters = adapters_of(popularity, batch)
            row = {"scenario": "prompt", "model": name, "popularity": popularity, "rank": rank}
            row |= {"batch": batch, "context": args.context, "prompt": prompt}
            milliseconds = prompt_ms(bench, adapters, args.context, prompt, 2 * args.repeats)
            yield {**row, "prompt_ms": milliseconds}


def parse_args() -> argparse.Namespace:
    """The command line."""

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--models", type=names, default=["7b", "8b"], help=", ".join(SHAPES))
    option("--rank", type=int, default=16, help="of every projection")
    option("--max-batch", type=int, default=32, help="sequences, and adapters, at a time")
    option("--batches", type=numbers, default=[1, 8, 32], help="of step_ms")
    option("--popularities", type=names, default=[BACKBONE, *POPULARITIES])
    option("--context", type=int, default=512, help="prompt tokens of step_ms")
    option("--contexts", type=names, default=["equal"], help=", ".join(CONTEXTS))
    option("--prefill-tokens", type=int, default=2048, help="rows of a step at most")
    option("--pages", type=int, help="of the arena; else as many as fit the GPU")
    option("--prompts", type=numbers, default=[], help="rows of the steps of prompt_ms")
    option("--repeats", type=int, default=3)
    option("--profile", action="store_true", help="break a step down by kernel")
    results.add_options(parser)
    args = parser.parse_args()
    if args.device == "cpu" and not args.pages:
        parser.error("--device cpu needs --pages")
    if unknown := {*args.contexts} - {*CONTEXTS}:
        parser.error(f"there are no contexts {', '.join(sorted(unknown))}")
    if max(args.batches, default=0) > args.max_batch:
        parser.error("--batches must not exceed --max-batch")
    return args


def main() -> None:
    """Measure, print, and write after each row, so that an interrupted run keeps its results."""
    args = parse_args()
    found = Results(args, ("scenario", "model", "popularity", "batch", "context", "prompt"))
    for model in args.models:
        for row in bench_model(args, model):
            found.add(row)
        gc.collect()  # graphs and what they compute refer to each other
        torch.cuda.empty_cache()  # the next one sizes its arena by what is free
    found.print_table(("step_ms", "p99_ms", "prompt_ms", "tokens_per_s", "idle"))


if __name__ == "__main__":
    main()
