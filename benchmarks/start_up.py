"""From nothing to serving: what a start waits for, and what captures cost those who decode.

    python benchmarks/start_up.py --out benchmarks/results/h200/start_up.json

A real engine with random weights, in a process of its own for each start:

* cold: no compiled kernel is on the disk.
* warm: the start before has left them there.

`ready_s` counts from the start of the process, imports and the GPU's driver included, until the
engine can serve. `beyond_weights_s` is that without the weights. Then `batch` - 1 streams decode
while an adapter is brought from the disk every 500 ms, and the engine captures its other graphs
between their steps: the gaps between tokens are compared with the same load on the same engine
after the last capture.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import results
import torch
import traffic
from adapter_images import FileImages
from child import in_child
from latencies import gaps, percentiles
from memory import Memory
from random_engine import EngineSize, EngineUsers, capture_all, start_engine
from results import Results, Row
from structlog.testing import capture_logs
from traffic import Request
from workload import SHAPES

from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.engine.engine import Engine

KEY = ("scenario", "model", "batch", "kernels")
COLUMNS = (
    *("ready_s", "beyond_weights_s", "weights_s", "kernels_s", "graphs_s", "first_token_s"),
    *("captured", "all_graphs_s", "device_mib", "free_mib"),
    *("inter_token_ms_p50", "inter_token_ms_p99", "inter_token_ms_max", "loads"),
)
PROMPT, ARRIVING_PROMPT, ARRIVING_OUTPUT = 512, 32, 4
LOAD_EVERY_S = 0.5
SPARE_SLOTS = 4
"""Slots that arriving adapters take turns in."""


def start(args: argparse.Namespace) -> Iterator[Row]:
    """One start, and what the engine then captures beside its streams."""
    config = SHAPES[args.model]
    if args.device == "cuda":
        torch.zeros(1, device="cuda")
    opened: list[float] = []

    def open_source(shape: ImageShape) -> FileImages:
        began = time.monotonic()
        images = FileImages(shape, args.rank, args.dir / "images", args.files)
        opened.append(time.monotonic() - began)
        return images

    size = EngineSize(
        device=args.device,
        batch=args.batch,
        rank=args.rank,
        adapters=args.batch + SPARE_SLOTS,
        host_cache_bytes=(args.batch + SPARE_SLOTS) * args.adapter_bytes,
        arena_bytes=args.arena_bytes,
    )
    with capture_logs() as logs:
        engine = start_engine(args.dir / args.model, size, open_source, all_graphs=False)
    ready = time.time() - args.began - sum(opened)
    said = {str(entry["event"]): entry for entry in logs}
    weights = said["weights loaded"]["seconds"]
    row: Row = {"scenario": "start", "kernels": args.kernels, "ready_s": round(ready, 1)}
    row |= {"beyond_weights_s": round(ready - weights, 1), "weights_s": weights}
    for name, event in (("kernels_s", "kernels compiled"), ("graphs_s", "graphs captured")):
        row[name] = said.get(event, {}).get("seconds", 0.0)
    users = EngineUsers(engine, config.vocab)
    began = time.monotonic()
    users.drive(((Request(PROMPT, 1),),))
    yield {**row, "first_token_s": round(time.monotonic() - began, 3)}
    yield from beside_streams(engine, users, args)


def beside_streams(engine: Engine, users: EngineUsers, args: argparse.Namespace) -> Iterator[Row]:
    """The streams' gaps with captures between their steps, and without."""
    adapters = iter(range(1000, 1_000_000))
    for scenario in ("captures", "no captures"):
        count = int(args.seconds / LOAD_EVERY_S)
        fresh = [next(adapters) for _ in range(count)]
        arriving = traffic.arriving(
            LOAD_EVERY_S, args.seconds, ARRIVING_PROMPT, ARRIVING_OUTPUT, fresh
        )
        streams = traffic.decoders(args.batch - 1, PROMPT, args.seconds)
        loads = engine.figures.adapter_loads
        with capture_logs() as logs:
            records = users.drive((*streams, *arriving), args.seconds)
        between = gaps(records[: args.batch - 1], after_s=1.0)
        row: Row = {"scenario": scenario, "kernels": args.kernels}
        row |= percentiles("inter_token_ms", between)
        row["inter_token_ms_max"] = round(max(between, default=0.0) * 1e3, 3)
        row["loads"] = engine.figures.adapter_loads - loads
        row["warnings"] = [str(entry["event"]) for entry in logs if entry["log_level"] != "info"]
        began = time.monotonic()
        capture_all(engine)  # what the streams left to capture
        row["all_graphs_s"] = round(time.monotonic() - began, 2)
        yield {**row, **_memory(args.device)}


def _memory(device: str) -> Row:
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    return {**Memory.now(device).row, "free_mib": free >> 20}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", choices=SHAPES, default="7b")
    option("--rank", type=int, default=16, help="of every projection")
    option("--batch", type=int, default=32, help="sequences at a time")
    option("--seconds", type=float, default=30, help="of streams, with and without captures")
    option("--files", type=int, default=16, help="that images lie in")
    option("--adapter-bytes", type=int, default=84 << 20, help="of pinned memory per adapter")
    option("--arena-bytes", type=int, help="of KV and adapters; else what the GPU has left")
    option("--dir", type=Path, default=Path(tempfile.gettempdir()) / "granatum-bench")
    results.add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write after each row, so that an interrupted run keeps its results."""
    from model_directory import write_model  # an engine's process does without transformers

    args = parse_args()
    found = Results(args, KEY)
    write_model(args.dir / args.model, SHAPES[args.model])
    cache = args.dir / "kernels"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        for kernels in ("cold", "warm"):
            args.kernels, args.began = kernels, time.time()
            for row in in_child(start, args):
                found.add({"model": args.model, "batch": args.batch, "rank": args.rank, **row})
    finally:
        shutil.rmtree(args.dir / "images", ignore_errors=True)
        found.print_table(COLUMNS)


if __name__ == "__main__":
    main()
