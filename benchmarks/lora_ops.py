"""Time of the LoRA ops on a layer's fused linears, as the engine would run them.

    python benchmarks/lora_ops.py --out benchmarks/results/h200/lora_ops.json [--peer FILE]

All batches at rank 16, some at the other ranks, and a batch whose adapters' ranks differ beside
batches of each of these ranks. A row is a shrink and its expand, in a CUDA graph over enough layers
that the L2 cache does not serve the adapters. Necessary bytes are A and B of each adapter in use
and x, read once, and y, read and written once. Prompts are also measured as a step goes:
`linear_us` is their linear, `without_lora_us` that and the kernel that reads what it makes,
`with_lora_us` the same with adapters. `--peer` names a JSON file whose `results` hold
another implementation's times of the same cases: model, group, rank, tokens, kind, and `us` by
implementation; its baseline's time becomes `vllm_us`.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import lora_ops_cases as cases
import lora_ops_prompts as prompts
import torch
from lora_harness import LAYOUT, setup, tile_batch
from results import Results, Row, add_options

from granatum.kernels.adapters import AdapterTable, GroupAdapters, LoraRows
from granatum.kernels.lora import ops as lora

KEY = ("model", "group", "rank", "rows", "popularity")
POOL_BYTES = 250e6
PROMPT_ROWS = 512
"""From which on a batch is of prompts."""
BATCHES = [
    *(cases.decode(rows, "distinct") for rows in (1, 2, 4, 8, 16, 32, 64)),
    *(cases.decode(32, p) for p in ("uniform", "skewed", "identical")),
    cases.prefill(PROMPT_ROWS, "identical"),
    *(cases.prefill(2048, p) for p in ("identical", "uniform", "distinct")),
]
OTHER_RANKS = (8, 32, 64, 128, 256)
FEWER_BATCHES = [
    cases.decode(1, "distinct"),
    *(cases.decode(32, p) for p in ("distinct", "identical")),
    cases.prefill(2048, "distinct"),
]
MIXED_RANKS = (8, 16, 32, 64, 128)
MIXED_ROWS = 8 * len(MIXED_RANKS)


@dataclass(frozen=True)
class Case:
    """A batch on a linear, as `lora_harness.setup` wants it."""

    linear: cases.Linear
    batch: cases.Batch
    scale: float = cases.SCALE

    @property
    def in_features(self) -> int:
        """Columns of x."""
        return self.linear.in_features

    @property
    def out_slices(self) -> tuple[int, ...]:
        """Columns of y, by projection."""
        return self.linear.out_features

    @property
    def rank(self) -> int:
        """Of every adapter."""
        return self.linear.rank

    @property
    def token_adapters(self) -> tuple[int, ...]:
        """Of each row of x."""
        return self.batch.adapters


def measure(case: Case, matrices: cases.Matrices) -> float:
    """Microseconds of a run, checked against float32 first."""
    slots = case.batch.distinct
    layers = cases.layers_of(case.batch, matrices.a[0].shape[0])
    spans = [slice(layer * slots, (layer + 1) * slots) for layer in range(layers)]
    sets = [
        cases.Matrices(tuple(a[s] for a in matrices.a), tuple(b[s] for b in matrices.b))
        for s in spans
    ]
    runs = setup(case, sets)
    x, y = cases.activations(case.linear, case.batch)
    expected = cases.truth(case.batch, sets[0], x, y)
    runs[0](x, y)
    torch.testing.assert_close(y.float(), expected, rtol=8e-3, atol=4e-3)
    return cases.graph_us([partial(run, x, y) for run in runs])


def measure_mixed(linears: Sequence[cases.Linear]) -> float:
    """Microseconds of MIXED_ROWS rows of an adapter each, whose ranks are the linears' in turn."""
    linear, layers = linears[-1], 8
    each = MIXED_ROWS // len(linears)
    packs = [cases.pack_matrices(cases.make_matrices(one, each * layers)) for one in linears]
    tables = [pack.table(linear.group_index, each, layers) for pack in packs]
    table = AdapterTable.allocate(LAYOUT, MIXED_ROWS, layers, "cuda", linear.rank)
    base = 0
    for i, (pack, own) in enumerate(zip(packs, tables, strict=True)):
        table.a[i :: len(linears)] = own.a + base
        table.b[i :: len(linears)] = own.b + base
        table.rank[i :: len(linears)] = own.rank
        table.scale[i :: len(linears)] = own.scale
        base += pack.arena.numel()
    arena = torch.cat([pack.arena.view(-1) for pack in packs])
    batch = cases.decode(MIXED_ROWS, "distinct")
    x, y = cases.activations(linear, batch)
    tiles = tile_batch(batch.adapters, lora.DECODE_BLOCK_M, x.device)
    elements = lora.workspace_elements(
        batch.rows, linear.in_features, linear.out_features, tiles.block_m, linear.rank, x.device
    )
    workspace = torch.empty(elements, device=x.device)
    rest = (linear.group_index, linear.in_features, linear.out_features)
    adapters = [GroupAdapters(arena, table, layer, *rest) for layer in range(layers)]
    rows = LoraRows(tiles, workspace)
    return cases.graph_us([partial(lora.add_lora, y, x, own, rows) for own in adapters])


def mixed_rows(model: str, bandwidth: float) -> list[Row]:
    """A batch of all MIXED_RANKS in turn, and one of each of these ranks."""
    batch, rows = cases.decode(MIXED_ROWS, "distinct"), []
    for group in cases.GROUPS:
        linears = [cases.Linear(model, group, rank) for rank in MIXED_RANKS]
        alike = []
        for linear in linears:
            matrices = cases.make_matrices(linear, batch.rows * 4)
            alike.append(
                row(Case(linear, batch), measure(Case(linear, batch), matrices), bandwidth)
            )
        us = measure_mixed(linears)
        moved = sum(batch.necessary_bytes(linear) for linear in linears) / len(linears)
        mixed = {
            **alike[-1],
            "rank": "+".join(str(rank) for rank in MIXED_RANKS),
            "popularity": "distinct, mixed ranks",
            "us": round(us, 2),
            "gb_per_s": round(moved / us / 1e3, 1),
            "fraction_of_read_bandwidth": round(moved / us * 1e6 / bandwidth, 3),
        }
        rows += [*alike, mixed]
    total = sum(r["us"] for r in rows if r["rank"] == mixed["rank"])
    mean = sum(r["us"] for r in rows if r["rank"] != mixed["rank"]) / len(MIXED_RANKS)
    print(f"{model} mixed ranks {total:.2f} us, {total / mean:.3f} of the ranks' mean {mean:.2f}")
    return rows


def row(
    case: Case, us: float, bandwidth: float, peer: Mapping[str, float] = MappingProxyType({})
) -> Row:
    """What the results say of a case."""
    linear, batch = case.linear, case.batch
    rate = batch.necessary_bytes(linear) / us * 1e6
    return {
        "model": linear.model,
        "group": linear.group,
        "rank": linear.rank,
        "rows": batch.rows,
        "popularity": batch.name.split(" ", 1)[1],
        "us": round(us, 2),
        "gb_per_s": round(rate / 1e9, 1),
        "fraction_of_read_bandwidth": round(rate / bandwidth, 3),
        "vllm_us": peer.get(f"{linear.model} {linear.group} {linear.rank} {batch.name}"),
    }


def read_peer(path: Path | None) -> dict[str, float]:
    """The other implementation's times, by case."""
    results = json.loads(path.read_text())["results"] if path else []
    return {
        f"{r['model']} {r['group']} {r['rank']} {r['tokens']} {r['kind']}": round(
            next(iter(r["us"].values())), 2
        )
        for r in results
    }


def report(title: str, rows: Sequence[Row]) -> None:
    """A layer's sums, ours and the peer's."""
    print(f"{title}, us per layer")
    for name in dict.fromkeys(f"{r['rows']} {r['popularity']}" for r in rows):
        own = [r for r in rows if f"{r['rows']} {r['popularity']}" == name]
        line = f"  {name:<16} {sum(r['us'] for r in own):8.2f}"
        if all(r["vllm_us"] for r in own):
            line += f"  vLLM {sum(r['vllm_us'] for r in own):8.2f}"
        if all("linear_us" in r for r in own):
            alone, bare, together = (sum(r[name] for r in own) for name in prompts.TIMES)
            added = together - bare
            line += f"  linears {alone:8.2f}, LoRA adds {added:.2f}, {added / alone:.1%}"
        print(line, flush=True)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--models", default="7b,8b")
    parser.add_argument("--ranks", default="16," + ",".join(str(rank) for rank in OTHER_RANKS))
    return parser.parse_args()


def main() -> None:
    """Measure every case, print a layer's sums, and write after each row."""
    args = parse_args()
    found = Results(args, KEY)
    peer, bandwidth = read_peer(args.peer), cases.read_bandwidth()
    for model in args.models.split(","):
        for rank in (int(r) for r in args.ranks.split(",")):
            batches = FEWER_BATCHES if rank in OTHER_RANKS else BATCHES
            mine = []
            for group in cases.GROUPS:
                linear = cases.Linear(model, group, rank)
                count = max(64, math.ceil(POOL_BYTES / linear.adapter_bytes))
                matrices = cases.make_matrices(linear, count)
                for case in (Case(linear, batch) for batch in batches):
                    measured = row(case, measure(case, matrices), bandwidth, peer)
                    if case.batch.rows >= PROMPT_ROWS:
                        measured |= prompts.measure(linear, case.batch, matrices)
                    found.add(measured)
                    mine.append(measured)
            report(f"{model} rank {rank}", mine)
        for measured in mixed_rows(model, bandwidth):
            found.add(measured)


if __name__ == "__main__":
    main()
