"""Finds the LoRA ops' configurations on this GPU, by measuring them.

    python benchmarks/lora_ops_tune.py --out DIR [--models 7b,8b] [--ranks 16] [--block-m 1,2,4]

For each fused linear, rank and rows per tile: the shrinks with a fixed expand, then the expands
with the best shrink, then the best pair without overlap of launches. Every configuration is checked
against float32 before it is timed; the score is the geometric mean over the batches, each in a
CUDA graph over enough layers that the L2 cache does not serve them. Writes `tune.json` (everything)
and `table.json` (the best configurations, as `kernels/h200.json` holds them), also when --seconds
run out.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lora_ops_cases as cases
import torch

from granatum.kernels.bench import Packed, tile_batch
from granatum.kernels.expand import launch_expand
from granatum.kernels.shrink import launch_shrink
from granatum.kernels.tuning import Config, Shape, default_config

DECODE = [
    cases.decode(1, "distinct"),
    cases.decode(8, "distinct"),
    cases.decode(32, "distinct"),
    cases.decode(32, "uniform"),
    cases.decode(32, "identical"),
    cases.decode(64, "distinct"),
]
PREFILL = [cases.prefill(2048, p) for p in ("identical", "uniform", "distinct")]
POOL_BYTES = 250e6
_COMPILERS = 12


@dataclass
class Search:
    """One fused linear at one number of rows per tile, and what was measured of it."""

    linear: cases.Linear
    block_m: int
    measured: list[tuple[Config, dict[str, float]]] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """What configurations are looked up by."""
        rank = -(-self.linear.rank // 8) * 8
        return Shape(self.linear.in_features, self.linear.out_features, rank, self.block_m)

    @property
    def batches(self) -> list[cases.Batch]:
        """What it is measured on."""
        return PREFILL if self.block_m >= 64 else DECODE

    @property
    def best(self) -> Config:
        """The configuration of the lowest geometric mean, or the default before any is measured."""
        return min(self.measured, key=lambda m: score(m[1]))[0] if self.measured else self.start

    @property
    def start(self) -> Config:
        """The default, its launches overlapping."""
        return replace(default_config(self.shape), pdl=True)


def score(times: dict[str, float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(us) for us in times.values()) / len(times))


def shrinks(search: Search) -> Iterator[Config]:
    """The best so far with other shrinks."""
    stacked = search.shape.max_rank * len(search.shape.out_features)
    if search.block_m < 16:
        tried = [(256, 8, 1), (512, 8, 1), (512, 4, 1), (1024, 4, 1), (1024, 4, 2), (1024, 8, 2)]
        tried += [(2048, 4, 4), (2048, 2, 2)]
        for chunk, r, warps in tried:
            shared = {min(-(-stacked // r), 24), min(-(-stacked // (2 * r)), 12)}
            for rank_blocks in sorted(shared) if (chunk, r) == (512, 8) else [max(shared)]:
                yield replace(
                    search.best,
                    chunk_k=chunk,
                    shrink_k=chunk,
                    shrink_r=r,
                    rank_blocks=rank_blocks,
                    shrink_warps=warps,
                    shrink_stages=1,
                )
        return
    wide = min(64, max(16, 1 << (stacked - 1).bit_length()))
    small = search.block_m == 16
    for chunk in (256, 512, 1024) if small else (1024, 2048, 4096):
        for k, r, warps, stages in (
            ((128, 16, 1, 3), (256, 16, 2, 2), (128, 32, 2, 3))
            if small
            else ((64, wide, 4, 3), (128, wide, 4, 3), (64, 16, 4, 4), (128, wide, 8, 2))
        ):
            yield replace(
                search.best,
                chunk_k=chunk,
                shrink_k=k,
                shrink_r=r,
                rank_blocks=min(-(-stacked // r), 4) if small else 1,
                shrink_warps=warps,
                shrink_stages=stages,
            )


def expands(search: Search) -> Iterator[Config]:
    """The best so far with other expands."""
    if search.block_m < 16:
        tried = [(256, 8, 1, 1), (256, 16, 1, 1), (512, 8, 2, 1), (512, 16, 2, 1), (1024, 8, 4, 1)]
        tried += [(512, 8, 1, 1), (1024, 16, 4, 1), (512, 8, 4, 1)]
    elif search.block_m == 16:
        tried = [(64, 16, 1, 2), (128, 16, 1, 2), (128, 16, 2, 2), (256, 16, 4, 2)]
    else:
        tried = [(64, 16, 4, 2), (128, 16, 4, 2), (256, 16, 8, 2), (128, 16, 8, 2), (128, 32, 4, 2)]
    for n, r, warps, stages in tried:
        yield replace(search.best, expand_n=n, expand_r=r, expand_warps=warps, expand_stages=stages)


def apart(search: Search) -> Iterator[Config]:
    """The best so far without overlap of launches."""
    yield replace(search.best, pdl=not search.best.pdl)


class Bench:
    """One linear's adapters, ready to run any configuration on any batch."""

    def __init__(self, search: Search, adapters: int) -> None:
        self.search = search
        self.adapters = adapters
        self.matrices = cases.make_matrices(search.linear, adapters)
        self.packed: Packed = cases.pack_matrices(self.matrices)

    def launches(
        self, batch: cases.Batch, config: Config, x: torch.Tensor, y: torch.Tensor
    ) -> list[Any]:
        """A shrink and expand per layer."""
        search, group = self.search, self.search.linear.group_index
        layers = cases.layers_of(batch, self.adapters)
        table = self.packed.table(group, batch.distinct, layers)
        capacity = batch.rows if batch.rows <= 128 else batch.rows // search.block_m + 16
        tiles = tile_batch(batch.adapters, search.block_m, x.device, capacity)
        workspace = torch.empty(config.workspace_elements(search.shape, batch.rows), device="cuda")
        rest = (tiles, workspace, search.shape, config)

        def run(layer: int) -> None:
            launch_shrink(x, self.packed.arena, table, layer, group, *rest)
            launch_expand(y, self.packed.arena, table, layer, group, *rest)

        return [partial(run, layer) for layer in range(layers)]

    def check(self, batch: cases.Batch, config: Config) -> None:
        """Raise AssertionError unless the configuration computes what it should."""
        x, y = cases.activations(self.search.linear, batch)
        expected = cases.truth(batch, self.matrices, x, y)
        self.launches(batch, config, x, y)[0]()
        torch.testing.assert_close(y.float(), expected, rtol=8e-3, atol=4e-3)

    def times(self, config: Config) -> dict[str, float]:
        """Microseconds per batch."""
        batches = self.search.batches
        self.check(batches[1 if self.search.block_m >= 64 else 3], config)
        found = {}
        for batch in batches:
            x, y = cases.activations(self.search.linear, batch)
            found[batch.name] = cases.graph_us(self.launches(batch, config, x, y))
        return found


def compile_one(search: Search, config: Config) -> str:
    """Launch a configuration once, in a process of its own, so that its binary is in the cache."""
    torch.manual_seed(0)
    try:
        Bench(search, 1).check(cases.decode(4, "identical"), config)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def pool_size(linear: cases.Linear) -> int:
    """Adapters that the caches cannot hold, and enough for the largest batch."""
    return max(64, math.ceil(POOL_BYTES / linear.adapter_bytes))


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
        bench = Bench(search, pool_size(search.linear))
        for config, error in mine:
            if error:
                failures.append({**describe(search), "config": asdict(config), "error": error})
            elif time.monotonic() < deadline:
                search.measured.append((config, bench.times(config)))
        report(name, search)


def report(name: str, search: Search) -> None:
    """A line: the best configuration and its times."""
    if search.measured:
        config, times = min(search.measured, key=lambda m: score(m[1]))
        line = " ".join(f"{us:7.2f}" for us in times.values())
        who = f"{search.linear.model} {search.linear.group:<7} r{search.linear.rank}"
        print(f"{name:<7} {who} m{search.block_m:<3} {line}  {tuple(asdict(config).values())}")


def describe(search: Search) -> dict[str, Any]:
    """What a search is about."""
    return {**asdict(search.linear), "block_m": search.block_m}


def totals(searches: Sequence[Search]) -> None:
    """Sums over a layer's groups, by rows per tile: of the best means, and of each batch's best."""
    for model, rank, block_m in sorted(
        {(s.linear.model, s.linear.rank, s.block_m) for s in searches}
    ):
        own = (model, rank, block_m)
        mine = [s for s in searches if (s.linear.model, s.linear.rank, s.block_m) == own]
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
    (out / "table.json").write_text(json.dumps({"gpu": gpu, "configs": table}, indent=1))


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
    parser.add_argument("--models", type=names, default=["7b"])
    parser.add_argument("--groups", type=names, default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--ranks", type=numbers, default=[16])
    parser.add_argument("--block-m", type=numbers, default=[1, 2, 4, 16, 64, 128])
    parser.add_argument("--seconds", type=float, default=330.0, help="stop measuring after these")
    return parser.parse_args()


def main() -> None:
    """Search, phase by phase, writing what is known after each."""
    args = parse_args()
    deadline = time.monotonic() + args.seconds
    print(f"{torch.cuda.get_device_name()}: reads {cases.read_bandwidth() / 1e12:.2f} TB/s")
    searches = [
        Search(cases.Linear(model, group, rank), block_m)
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
    totals(searches)
    for failure in failures[:8]:
        print(failure["group"], failure["block_m"], failure["error"])
    print(f"{len(failures)} configurations failed")


if __name__ == "__main__":
    main()
