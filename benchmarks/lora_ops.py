"""Time of the LoRA ops on a layer's fused linears, as the engine would run them.

    python benchmarks/lora_ops.py --out benchmarks/results/h200/lora_ops.json [--peer FILE]

A row is a shrink and its expand, in a CUDA graph over enough layers that the L2 cache does not
serve the adapters. Necessary bytes are A and B of each adapter in use and x, read once, and y, read
and written once. `--peer` names a JSON file whose `results` hold another implementation's times of
the same cases: model, group, rank, tokens, kind, and `us` by implementation; its baseline's time
becomes `vllm_us`.
"""

import argparse
import json
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lora_ops_cases as cases
import torch

from granatum.kernels.bench import setup

POOL_BYTES = 250e6
BATCHES = [
    cases.decode(1, "distinct"),
    *(cases.decode(8, popularity) for popularity in ("distinct", "identical")),
    *(cases.decode(32, p) for p in ("distinct", "uniform", "skewed", "identical")),
    cases.decode(64, "distinct"),
    *(cases.prefill(2048, p) for p in ("identical", "uniform", "distinct")),
]


@dataclass(frozen=True)
class Case:
    """A batch on a linear, as `granatum.kernels.bench.setup` wants it."""

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


def row(case: Case, us: float, bandwidth: float, peer: dict[str, float]) -> dict[str, Any]:
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
        f"{r['model']} {r['group']} {r['rank']} {r['tokens']} {r['kind']}": next(
            iter(r["us"].values())
        )
        for r in results
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--models", default="7b,8b")
    parser.add_argument("--ranks", default="16")
    return parser.parse_args()


def main() -> None:
    """Measure every case, print a layer's sums, write the rows."""
    args = parse_args()
    peer, bandwidth = read_peer(args.peer), cases.read_bandwidth()
    rows = []
    for model in args.models.split(","):
        for rank in (int(r) for r in args.ranks.split(",")):
            sums = dict.fromkeys((batch.name for batch in BATCHES), 0.0)
            for group in ("qkv", "o", "gate_up", "down"):
                linear = cases.Linear(model, group, rank)
                count = max(64, round(POOL_BYTES / linear.adapter_bytes))
                matrices = cases.make_matrices(linear, count)
                for batch in BATCHES:
                    case = Case(linear, batch)
                    us = measure(case, matrices)
                    sums[batch.name] += us
                    rows.append(row(case, us, bandwidth, peer))
            print(f"{model} rank {rank}, us per layer")
            for name, us in sums.items():
                print(f"  {name:<14} {us:8.2f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "command": "python benchmarks/lora_ops.py",
        "commit": commit.stdout.strip() or "unknown",
        "gpu": torch.cuda.get_device_name(),
        "read_bandwidth": bandwidth,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
