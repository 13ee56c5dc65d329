"""Finds the LoRA ops' configurations on this GPU, by measuring them.

    python benchmarks/lora_ops_tune.py --out DIR [--table kernels/h200.json] [--models 7b,8b]

For each fused linear, largest rank and regime: the shrinks with a fixed expand, then the expands
with the best shrink, then the best pair without overlap of launches. Every configuration is checked
against float32 before it is timed; the score is the geometric mean over the batches, each in a
CUDA graph over enough layers that the L2 cache does not serve them, of adapters of a usual rank and
of the largest. Of prompts it is the mean of what adapters add to the linear and the kernel after
it. Writes `tune.json` (everything) and `table.json` (the best configurations), also
when --seconds run out; --table merges these into the table that the kernels read.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lora_ops_cases as cases
import lora_ops_prompts as prompts
import torch
from lora_harness import Packed, tile_batch

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.lora.expand import launch_expand
from granatum.kernels.lora.shrink import launch_shrink
from granatum.kernels.lora.tuning import (
    DECODE_BLOCK_M,
    PREFILL_BLOCK_M,
    Config,
    Shape,
    default_config,
)

DECODE = [
    cases.decode(1, "distinct"),
    cases.decode(32, "distinct"),
    cases.decode(32, "uniform"),
    cases.decode(32, "identical"),
]
PREFILL = [
    cases.prefill(512, "identical"),
    *(cases.prefill(2048, p) for p in ("identical", "distinct")),
]
USUAL_RANK = 16
"""Also measured where larger ranks are allowed."""
POOL_BYTES = 250e6
_COMPILERS = 12


@dataclass
class Search:
    """One fused linear by rows or by tiles, and what was measured of it."""

    model: str
    group: str
    max_rank: int
    block_m: int
    measured: list[tuple[Config, dict[str, float]]] = field(default_factory=list)

    @property
    def linears(self) -> list[cases.Linear]:
        """What it is measured on: adapters of the largest rank, and of a usual one."""
        ranks = sorted({min(USUAL_RANK, self.max_rank), self.max_rank})
        return [cases.Linear(self.model, self.group, rank) for rank in ranks]

    @property
    def shape(self) -> Shape:
        """What configurations are looked up by."""
        linear = self.linears[0]
        return Shape(linear.in_features, linear.out_features, self.max_rank, self.block_m)

    @property
    def batches(self) -> list[cases.Batch]:
        """What it is measured on."""
        return PREFILL if self.shape.dot else DECODE

    @property
    def best(self) -> Config:
        """The configuration of the lowest geometric mean, or the default before any is measured."""
        return min(self.measured, key=lambda m: score(m[1]))[0] if self.measured else self.start

    @property
    def start(self) -> Config:
        """The default, its launches overlapping."""
        return default_config(self.shape, pdl=True)


def score(times: dict[str, float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(us) for us in times.values()) / len(times))


def shrinks(search: Search) -> Iterator[Config]:
    """The best so far with other shrinks.

    Rank blocks, of 16, are as many as fill some of the ranks: an absent one costs more than a loop
    of an adapter that has it, and less than a long one's.
    """
    projections = len(search.shape.out_features)
    if search.shape.dot:
        k = search.shape.in_features
        chunks = sorted({c for c in (1024, 2048, k // 2) if c >= k // 8 and c % 128 == 0})
        for chunk, r, blocks in product(chunks, (16, 32, 64), (1, 2, 4)):
            if USUAL_RANK * projections <= r * blocks <= max(64, projections * search.max_rank):
                config = replace(search.best, chunk_k=chunk, shrink_k=128, shrink_r=r)
                yield replace(config, rank_blocks=blocks, shrink_warps=4, shrink_stages=3)
        return
    for chunk in (256, 512):
        for ranks in (16, 32, 64, 128):
            if ranks == 16 or ranks <= search.max_rank // 2:
                blocks = projections * ranks // 16
                yield replace(search.best, chunk_k=chunk, shrink_k=chunk, rank_blocks=blocks)


def expands(search: Search) -> Iterator[Config]:
    """The best so far with other expands."""
    if search.shape.dot:
        for span in (256, 512, 1024):
            yield replace(search.best, expand_span=span, silu_n=span)
        return
    for n in (128, 256):
        yield replace(search.best, expand_n=n, expand_span=n)


def apart(search: Search) -> Iterator[Config]:
    """The best so far without overlap of launches."""
    yield replace(search.best, pdl=False)


class Bench:
    """One linear's adapters, ready to run any configuration on any batch."""

    def __init__(self, search: Search, linear: cases.Linear, adapters: int | None = None) -> None:
        self.search = search
        self.linear = linear
        self.adapters = adapters or max(64, math.ceil(POOL_BYTES / linear.adapter_bytes))
        self.matrices = cases.make_matrices(linear, self.adapters)

    @cached_property
    def packed(self) -> Packed:
        """The adapters as decodes read them; prompts' rigs pack their own."""
        return cases.pack_matrices(self.matrices)

    def launches(
        self, batch: cases.Batch, config: Config, x: torch.Tensor, y: torch.Tensor
    ) -> list[Any]:
        """A shrink and expand per layer."""
        search, group = self.search, self.linear.group_index
        layers = cases.layers_of(batch, self.adapters)
        table = self.packed.table(group, batch.distinct, layers)
        tiles = tile_batch(batch.adapters, search.block_m, x.device)
        workspace = torch.empty(config.workspace_elements(search.shape, batch.rows), device="cuda")
        rest = (LoraRows(tiles, workspace), search.shape, config)
        widths = (self.linear.in_features, self.linear.out_features)

        def run(adapters: GroupAdapters) -> None:
            launch_shrink(x, adapters, *rest)
            launch_expand(y, adapters, *rest)

        every = (GroupAdapters(self.packed.arena, table, n, group, *widths) for n in range(layers))
        return [partial(run, adapters) for adapters in every]

    def check(self, batch: cases.Batch, config: Config) -> None:
        """Raise AssertionError unless the configuration computes what it should."""
        x, y = cases.activations(self.linear, batch)
        expected = cases.truth(batch, self.matrices, x, y)
        self.launches(batch, config, x, y)[0]()
        torch.testing.assert_close(y.float(), expected, rtol=8e-3, atol=4e-3)

    def times(self, config: Config) -> dict[str, float]:
        """Microseconds per batch."""
        found = {}
        for batch in self.search.batches:
            name = f"r{self.linear.rank} {batch.name}"
            if self.search.shape.dot:
                found[name] = self.added(batch, config)
                continue
            self.check(batch, config)
            x, y = cases.activations(self.linear, batch)
            found[name] = cases.graph_us(self.launches(batch, config, x, y))
        return found

    def added(self, batch: cases.Batch, config: Config) -> float:
        """Microseconds that adapters add to prompts' linear and the kernel after it."""
        prompts.use(self.search.shape, config)
        times = prompts.measure(self.linear, batch, self.matrices, self.search.max_rank)
        return max(times["with_lora_us"] - times["without_lora_us"], 1.0)


def compile_one(search: Search, config: Config) -> str:
    """Launch a configuration once, in a process of its own, so that its binary is in the cache."""
    torch.manual_seed(0)
    try:
        bench = Bench(search, search.linears[0], prompts.LAYERS)
        if search.shape.dot:
            prompts.use(search.shape, config)
            for batch in PREFILL[:2]:
                rig = prompts.Rig(bench.linear, batch, bench.matrices, search.max_rank)
                rig.check(bench.matrices)
        else:
            bench.check(cases.decode(4, "identical"), config)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def phase(
    name: str,
    searches: Sequence[Search],
    candidates: Any,
    compilers: ProcessPoolExecutor,
    deadline: float,
    failures: list[dict[str, Any]],
) -> None:
    """Measure each search's candidates, compiled first and all at once."""
    work = [(s, c) for s in searches for c in candidates(s) if c not in [m[0] for m in s.measured]]
    began = time.monotonic()
    errors = list(compilers.map(compile_one, *zip(*work, strict=True))) if work else []
    print(f"{name}: {len(work)} compiled in {time.monotonic() - began:.0f} s", flush=True)
    for search in searches:
        mine = [(c, e) for (s, c), e in zip(work, errors, strict=True) if s is search]
        benches = [Bench(search, linear) for linear in search.linears]
        for config, error in mine:
            if error:
                failures.append({**describe(search), "config": asdict(config), "error": error})
            elif time.monotonic() < deadline:
                found = [bench.times(config) for bench in benches]
                search.measured.append(
                    (config, {k: v for times in found for k, v in times.items()})
                )
        report(name, search)


def report(name: str, search: Search) -> None:
    """A line: the best configuration and its times."""
    if search.measured:
        config, times = min(search.measured, key=lambda m: score(m[1]))
        line = " ".join(f"{us:7.2f}" for us in times.values())
        who = f"{search.model} {search.group:<7} r{search.max_rank}"
        print(f"{name:<7} {who} m{search.block_m:<3} {line}  {tuple(asdict(config).values())}")


def describe(search: Search) -> dict[str, Any]:
    """What a search is about."""
    keys = ("model", "group", "max_rank", "block_m")
    return {key: getattr(search, key) for key in keys}


def totals(searches: Sequence[Search]) -> None:
    """Sums over a layer's groups, by rows per tile: of the best means, and of each batch's best."""
    for model, rank, block_m in sorted({(s.model, s.max_rank, s.block_m) for s in searches}):
        own = (model, rank, block_m)
        mine = [s for s in searches if (s.model, s.max_rank, s.block_m) == own]
        if not all(s.measured for s in mine):
            continue
        chosen = [min(s.measured, key=lambda m: score(m[1]))[1] for s in mine]
        print(f"\n{model} r{rank} m{block_m}, us per layer of {len(mine)} groups")
        for batch in chosen[0]:
            best = sum(min(t[batch] for _, t in s.measured) for s in mine)
            print(f"  {batch:<14} {sum(t[batch] for t in chosen):7.2f}   best each {best:7.2f}")


def write(out: Path, searches: Sequence[Search], failures: list[dict[str, Any]]) -> None:
    """Everything measured, and the table of the best."""
    table: dict[str, dict[str, Any]] = {}
    for search in searches:
        if search.measured:
            by_rank = table.setdefault(search.shape.key, {})
            by_rank[str(search.shape.max_rank)] = asdict(search.best)
    measured = [
        {**describe(s), "config": asdict(c), "us": t} for s in searches for c, t in s.measured
    ]
    gpu = torch.cuda.get_device_name()
    out.mkdir(parents=True, exist_ok=True)
    everything = {"gpu": gpu, "measured": measured, "failures": failures}
    (out / "tune.json").write_text(json.dumps(everything, indent=1))
    (out / "table.json").write_text(json.dumps({"gpu": gpu, "configs": table}, indent=1) + "\n")


def merge(table: Path, made: Path) -> None:
    """Put what was found into a table, which keeps its other shapes and ranks."""
    new = json.loads(made.read_text())
    configs = json.loads(table.read_text())["configs"] if table.exists() else {}
    for shape, by_rank in new["configs"].items():
        configs[shape] = {**configs.get(shape, {}), **by_rank}
    merged = {"gpu": new["gpu"], "configs": dict(sorted(configs.items()))}
    table.write_text(json.dumps(merged, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="merge the best configurations into this file")
    parser.add_argument("--models", type=names, default=["7b", "8b"])
    parser.add_argument("--groups", type=names, default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--ranks", type=numbers, default=[16])
    parser.add_argument("--block-m", type=numbers, default=[DECODE_BLOCK_M, PREFILL_BLOCK_M])
    parser.add_argument("--seconds", type=float, default=330.0, help="stop measuring after these")
    return parser.parse_args()


def main() -> None:
    """Search, phase by phase, writing what is known after each."""
    args = parse_args()
    deadline = time.monotonic() + args.seconds
    print(f"{torch.cuda.get_device_name()}: reads {cases.read_bandwidth() / 1e12:.2f} TB/s")
    searches = [
        Search(model, group, rank, block_m)
        for rank in args.ranks
        for block_m in args.block_m
        for model in args.models
        for group in args.groups
        if not (model == "8b" and group == "o" and "7b" in args.models)
    ]
    failures: list[dict[str, Any]] = []
    with ProcessPoolExecutor(_COMPILERS, mp_context=get_context("spawn")) as compilers:
        for name, candidates in (("shrink", shrinks), ("expand", expands), ("apart", apart)):
            phase(name, searches, candidates, compilers, deadline, failures)
            write(args.out, searches, failures)
    if args.table:
        merge(args.table, args.out / "table.json")
    totals(searches)
    for failure in failures[:8]:
        print(failure["group"], failure["block_m"], failure["error"])
    print(f"{len(failures)} configurations failed")


if __name__ == "__main__":
    main()
