"""Finds how the linears of a decode step are best cut on this GPU, by measuring them.

    python benchmarks/linear_tune.py --out DIR [--models 7b,8b] [--rows 8,32,64]

A launch is timed together with the small kernel that makes its input, as in a step, inside a CUDA
graph over enough weights that the L2 cache does not serve them. Every configuration is checked
against float32 first: the tiles and splits at 32 rows, then the best of them at the other numbers
of rows; the library on the same terms. Writes
`tune.json` (everything) and `table.json`, as `kernels/h200_linear.json` holds it: null where the
library was faster.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import lora_ops_cases as cases
import torch
from workload import SHAPES

from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.linear.linear import Config, Workspace, launch_linear, shape_key

TILES = [
    Config(64, 64, 1, 4, 5),
    Config(64, 64, 1, 4, 8),
    Config(64, 128, 1, 4, 2),
    Config(64, 128, 1, 4, 3),
    Config(64, 128, 1, 4, 4),
    Config(64, 128, 1, 4, 6),
    Config(64, 256, 1, 4, 2),
    Config(64, 256, 1, 4, 3),
    Config(128, 64, 1, 4, 4),
    Config(128, 64, 1, 4, 6),
    Config(128, 128, 1, 8, 3),
    Config(128, 128, 1, 8, 4),
]
SPLITS = (1, 2, 3, 4, 6)
FINALISTS = 4
BLOCKS = (96, 900)
"""The fewest and the most blocks that are tried, but where one split makes more."""
POOL_BYTES = 400e6
SHARED_BYTES = 227 * 1024
_COMPILERS = 14


@dataclass
class Search:
    """One linear and its weights' shape, and what was measured of it, by rows."""

    name: str
    in_features: int
    out_features: int
    measured: dict[int, list[tuple[Config | None, float]]] = field(default_factory=dict)

    @property
    def floor_us(self) -> float:
        """Microseconds of reading W at 4.28 TB/s."""
        return 2 * self.in_features * self.out_features / 4.28e6

    def candidates(self) -> Iterator[Config]:
        """Tiles that divide the shape, with the splits that make a sensible number of blocks."""
        for tile in TILES:
            if self.out_features % tile.block_n or self.in_features % tile.block_k:
                continue
            blocks = self.out_features // tile.block_n
            for splits in SPLITS:
                least, most = BLOCKS
                if least <= blocks * splits and (blocks * splits <= most or splits == 1):
                    yield replace(tile, splits=splits)

    def finalists(self) -> list[Config]:
        """The best at 32 rows."""
        ours = [(us, config) for config, us in self.measured[32] if config]
        return [config for _, config in sorted(ours, key=lambda m: m[0])[:FINALISTS]]

    def best(self, rows: int) -> Config | None:
        """The fastest, the library (None) among them."""
        return min(self.measured[rows], key=lambda m: m[1])[0]


def searches(models: list[str]) -> list[Search]:
    """Every linear of the models, each shape once."""
    found: dict[tuple[int, int], Search] = {}
    for model in models:
        config = SHAPES[model]
        for group in config.in_features:
            k, n = config.in_features[group], sum(config.out_features[group])
            found.setdefault((k, n), Search(f"{model} {group}", k, n))
        shape = (config.hidden, config.vocab)
        found.setdefault(shape, Search(f"{model} head", *shape))
    return list(found.values())


class Bench:
    """A linear's weights, enough of them, and the input of the kernel that makes x."""

    def __init__(self, search: Search) -> None:
        k, n = search.in_features, search.out_features
        layers = max(2, math.ceil(POOL_BYTES / (2 * k * n)))
        self.weights = [
            torch.randn(n, k, dtype=torch.bfloat16, device="cuda").mul_(k**-0.5)
            for _ in range(layers)
        ]
        self.workspace = Workspace.of_size(64 * 6 * n, n, self.weights[0].device)

    def run(
        self, source: torch.Tensor, weight: torch.Tensor, config: Config | None
    ) -> torch.Tensor:
        """The kernel that makes x, then the linear."""
        x = source.new_empty(source.shape[0], source.shape[1] // 2)
        silu_mul(source, x)
        if config is None:
            return torch.nn.functional.linear(x, weight)
        return launch_linear(x, weight, None, self.workspace, config)

    def us(self, rows: int, config: Config | None) -> float:
        """Microseconds of a linear and the kernel before it; checked first."""
        k = self.weights[0].shape[1]
        source = torch.randn(rows, 2 * k, dtype=torch.bfloat16, device="cuda")
        if config is not None:
            x = source.new_empty(rows, k)
            silu_mul(source, x)
            expected = x.float() @ self.weights[0].float().T
            found = self.run(source, self.weights[0], config).float()
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        return cases.graph_us([partial(self.run, source, w, config) for w in self.weights])


def compile_tile(tile: Config, rows: int) -> str:
    """Launch a tile with and without splits, so that its binaries are in the cache."""
    weight = torch.randn(256, 2048, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(rows, 2048, dtype=torch.bfloat16, device="cuda")
    workspace = Workspace.of_size(64 * 512, 512, x.device)
    try:
        for splits in (1, 2):
            launch_linear(x, weight, None, workspace, replace(tile, splits=splits))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{tile} at {rows} rows: {type(error).__name__}: {str(error)[:150]}"
    return ""


def fits(tile: Config, rows: int) -> bool:
    """Whether its tiles of W and x find room in shared memory."""
    return 2 * tile.stages * tile.block_k * (tile.block_n + max(rows, 16)) <= SHARED_BYTES


def measure(search: Search, rows_tried: list[int], deadline: float) -> None:
    """Fill `search.measured`."""
    bench = Bench(search)
    first = [config for config in search.candidates() if fits(config, 32)]
    for rows in (32, *(n for n in rows_tried if n != 32)):
        search.measured[rows] = [(None, bench.us(rows, None))]
        for config in first if rows == 32 else search.finalists():
            if time.monotonic() < deadline and fits(config, rows):
                search.measured[rows].append((config, bench.us(rows, config)))
        report(search, rows)


def report(search: Search, rows: int) -> None:
    """A line: the library, and the best few."""
    (_, library), *ours = search.measured[rows]
    best = sorted(ours, key=lambda m: m[1])[:3]
    line = "  ".join(f"{us:6.1f} {tuple(asdict(c).values())}" for c, us in best if c)
    name = f"{search.name:<10} {rows:>2}"
    print(f"{name} floor {search.floor_us:6.1f} library {library:6.1f} | {line}", flush=True)


def write(out: Path, found: list[Search]) -> None:
    """Everything measured, and the table of the best."""
    table = {
        shape_key(s.in_features, s.out_features, rows): s.best(rows)
        for s in found
        for rows in s.measured
    }
    measured = [
        {"linear": s.name, "rows": rows, "config": asdict(c) if c else None, "us": us}
        for s in found
        for rows, results in s.measured.items()
        for c, us in results
    ]
    gpu = torch.cuda.get_device_name()
    out.mkdir(parents=True, exist_ok=True)
    (out / "tune.json").write_text(json.dumps({"gpu": gpu, "measured": measured}, indent=1))
    write_table(out / "table.json", table)


def write_table(path: Path, table: Mapping[str, Config | None]) -> None:
    """As `kernels/linear/linear.py` reads it, a line for each shape."""
    rows = (f"  {json.dumps(k)}: {json.dumps(asdict(c) if c else None)}" for k, c in table.items())
    gpu, lines = torch.cuda.get_device_name(), ",\n".join(rows)
    path.write_text(f'{{"gpu": "{gpu}", "configs": {{\n{lines}\n}}}}\n')


def parse_args() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["7b", "8b"])
    parser.add_argument("--rows", type=numbers, default=[8, 32, 64])
    parser.add_argument("--seconds", type=float, default=120.0, help="stop measuring after these")
    return parser.parse_args()


def main() -> None:
    """Compile, measure linear by linear, and write what is known after each."""
    args = parse_args()
    torch.manual_seed(0)
    work = [(tile, rows) for rows in (16, 32, 64) for tile in TILES if fits(tile, rows)]
    began = time.monotonic()
    with ProcessPoolExecutor(_COMPILERS, mp_context=get_context("spawn")) as compilers:
        failures = [
            error for error in compilers.map(compile_tile, *zip(*work, strict=True)) if error
        ]
    print(f"compiled {len(work)} tiles in {time.monotonic() - began:.0f} s", *failures, sep="\n")
    print(f"reads {cases.read_bandwidth() / 1e12:.2f} TB/s")
    deadline = time.monotonic() + args.seconds
    found = searches(args.models)
    for search in found:
        measure(search, args.rows, deadline)
        write(args.out, found)


if __name__ == "__main__":
    main()
