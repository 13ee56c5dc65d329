"""Adapters on the move: what loads cost those who decode, those who wait, and the machine.

    python benchmarks/loads.py --out benchmarks/results/h200/loads.json

A real engine with random weights and the real adapter cache and loader, driven in this process.
Images lie in `--files` files on local disk; digests beyond that share them, but every digest has
its own pages in host memory and on the device. Parts, by --only:

* arrivals: `batch` - 1 streams decode while short requests arrive, with no adapter to load
  (`resident`), with one from pinned host memory every 100 ms, and with one from the disk every
  500 ms (read past the operating system's cache). `quiet`: nothing arrives.
* scale: `batch` users with S-LoRA's lengths over 2,000 adapters, about 200 of them on the device
  at a time, beside the same users with one resident adapter each.
* churn: nothing but loads, and the memory they leave behind.
* start: seconds until an engine serves.
"""

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import results
import torch
import traffic
from adapter_images import FileImages
from child import Part, in_child
from latencies import Record, gaps, percentiles, steady_tokens_per_s, summary
from memory import Memory
from model_directory import write_model
from random_engine import EngineSize, EngineUsers, start_engine
from results import Results, Row
from structlog.testing import capture_logs
from traffic import Request
from workload import SHAPES

from granatum.runner.adapter_image import ImageShape
from granatum.runner.engine import Engine

KEY = ("scenario", "model", "batch", "tier", "popularity", "adapters")
COLUMNS = (
    *("tokens_per_s", "share", "inter_token_ms_p50", "inter_token_ms_p99", "p99_by_resident"),
    *("ttft_ms_p50", "ttft_ms_p99", "added_ms_p50", "loads"),
    *("device_grown_mib", "pinned_grown_mib", "resident_grown_mib", "total_s", "graphs_s"),
)
PARTS = ("start", "arrivals", "scale", "churn")
PROMPT, ARRIVING_PROMPT, ARRIVING_OUTPUT = 512, 32, 8
HOST_EVERY_S, DISK_EVERY_S = 0.1, 0.5
SPARE_SLOTS = 4
"""Slots that arriving adapters take turns in."""
HOST_ADAPTERS = 24
"""That arrive from host memory."""

Rows = Iterator[Row]


class Rig:
    """An engine whose adapters come from files, and its users."""

    def __init__(self, args: argparse.Namespace, slots: int, host_adapters: int) -> None:
        config = SHAPES[args.model]
        model = write_model(args.dir / args.model, config)
        began = time.monotonic()
        with capture_logs() as self.logs:
            self.engine: Engine = start_engine(
                model,
                EngineSize(
                    device=args.device,
                    batch=args.batch,
                    rank=args.rank,
                    adapters=slots,
                    host_bytes=host_adapters * args.adapter_bytes,
                    arena_bytes=args.arena_bytes,
                ),
                lambda shape: self._open(args, shape),
            )
        self.start_s = time.monotonic() - began - self._files_s
        self.users = EngineUsers(self.engine, config.vocab)

    def _open(self, args: argparse.Namespace, shape: ImageShape) -> FileImages:
        began = time.monotonic()
        self.images = FileImages(shape, args.rank, args.dir / "images", args.files)
        self._files_s = time.monotonic() - began
        return self.images

    @property
    def loads(self) -> int:
        """Adapters brought onto the device so far."""
        return self.engine.figures.adapter_loads


def arrivals(args: argparse.Namespace) -> Rows:
    """Loads beside streams."""
    decoding = args.batch - 1
    hosted = range(1000, 1000 + HOST_ADAPTERS)
    on_disk = range(2000, 2000 + 4 * HOST_ADAPTERS)
    rig = Rig(args, decoding + SPARE_SLOTS, decoding + SPARE_SLOTS + HOST_ADAPTERS + 8)
    streams = traffic.decoders(decoding, PROMPT, args.seconds)

    def measure(tier: str, every_s: float, adapters: range) -> Row:
        arriving = traffic.arriving(
            every_s, args.seconds, ARRIVING_PROMPT, ARRIVING_OUTPUT, adapters
        )
        before = rig.loads
        records = rig.users.drive((*streams, *arriving), args.seconds)
        row: Row = {"scenario": "arrivals", "tier": tier, "every_ms": round(every_s * 1e3)}
        row |= _beside(records, decoding)
        return {**row, "loads": rig.loads - before}

    rig.users.touch(range(decoding))
    quiet = measure("none", args.seconds, range(1))
    yield {**quiet, "tier": "quiet"}
    for tier, every_s, adapters in (
        ("host", HOST_EVERY_S, hosted),
        ("disk", DISK_EVERY_S, on_disk),
    ):
        rig.images.cold = tier == "disk"
        rig.users.touch([*range(decoding), *adapters, *range(decoding)])
        resident = measure("resident", every_s, range(1))
        yield {**resident, "tier": f"{tier}: resident instead"}
        row = measure(tier, every_s, adapters)
        p99, ttft = "inter_token_ms_p99", "ttft_ms_p50"
        row["p99_by_resident"] = round(row[p99] / resident[p99], 3)
        row["p99_by_quiet"] = round(row[p99] / quiet[p99], 3)
        yield {**row, "added_ms_p50": round(row[ttft] - resident[ttft], 3)}


def _beside(records: list[Record], decoding: int) -> Row:
    """Of the streams after their first second, and of those that arrived."""
    arrived = [r for r in records if r.user >= decoding and r.times]
    first = [r.times[0] - r.sent for r in arrived]
    row: Row = percentiles("inter_token_ms", gaps(records[:decoding], after_s=1.0))
    return {**row, "arrived": len(first), **percentiles("ttft_ms", first)}


def scale(args: argparse.Namespace) -> Rows:
    """Many adapters, most of them somewhere else."""
    rig = Rig(args, args.resident, args.hosted)
    own: list[Iterator[int]] = [itertools.repeat(i) for i in range(args.batch)]
    rig.users.touch(range(args.batch))
    baseline = 0.0
    for popularity in ("own", "uniform", "zipf 1.0"):
        chosen = own
        if popularity != "own":
            exponent = 0.0 if popularity == "uniform" else 1.0
            chosen = [traffic.zipf(args.adapters, exponent, i) for i in range(args.batch)]
            rig.users.touch(list(itertools.islice(chosen[0], 2 * args.resident)))
        users = traffic.closed(chosen, args.seconds)
        before = rig.loads
        records = rig.users.drive(users, args.seconds)
        speed = steady_tokens_per_s(records, users)
        baseline = baseline or speed
        row: Row = {"scenario": "scale", "popularity": popularity}
        row["adapters"] = args.batch if popularity == "own" else args.adapters
        row |= summary([record for record in records if record.index])
        row |= percentiles("inter_token_ms", gaps(records))
        row |= {"tokens_per_s": speed, "share": round(speed / baseline, 4)}
        yield {**row, "resident": args.resident, "loads": rig.loads - before}


def churn(args: argparse.Namespace) -> Rows:
    """Loads without end, one token each."""
    rig = Rig(args, args.resident, args.hosted)
    chosen = traffic.zipf(args.adapters, 0.0, 0)

    def touch(adapters: int) -> None:
        rig.users.touch(list(itertools.islice(chosen, adapters)))

    touch(4 * args.resident)  # now everything has been in use
    begun, before = time.monotonic(), rig.loads
    samples = [(0, Memory.now(args.device))]
    while samples[-1][0] < args.loads:
        touch(max(args.loads // 20, 1))
        samples.append((rig.loads - before, Memory.now(args.device)))
    (_, first), (loads, last) = samples[0], samples[-1]
    row: Row = {"scenario": "churn", "adapters": args.adapters, "loads": loads}
    row["loads_per_s"] = round(loads / (time.monotonic() - begun), 1)
    row |= {**last.row, **last.since(first)}
    yield {**row, "samples": [{"loads": count, **memory.row} for count, memory in samples]}


def start(args: argparse.Namespace) -> Rows:
    """From nothing to serving; imports and the driver's start are not in it."""
    began = time.monotonic()
    if args.device == "cuda":
        torch.zeros(1, device="cuda")
    driver = time.monotonic() - began
    rig = Rig(args, args.batch, args.batch)
    began = time.monotonic()
    rig.users.drive(((Request(PROMPT, 1),),))
    first = time.monotonic() - began
    said = {str(log["event"]): log for log in rig.logs}
    row: Row = {"scenario": "start", "driver_s": round(driver, 2)}
    row["weights_s"] = said["weights loaded"]["seconds"]
    row["graphs_s"] = said.get("graphs captured", {}).get("seconds", 0.0)
    row["graphs"] = said.get("graphs captured", {}).get("graphs", 0)
    yield {**row, "total_s": round(rig.start_s, 1), "first_token_s": round(first, 3)}


def measure(args: argparse.Namespace, found: Results) -> None:
    """The parts that were asked for, each with an engine of its own."""
    parts: dict[str, Part] = {
        "start": start,
        "arrivals": arrivals,
        "scale": scale,
        "churn": churn,
    }
    common = {"model": args.model, "batch": args.batch, "rank": args.rank}
    for name in args.only:
        for row in in_child(parts[name], args):
            found.add({**common, **row})


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--only", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    option("--model", choices=SHAPES, default="7b")
    option("--rank", type=int, default=16, help="of every projection")
    option("--batch", type=int, default=32, help="sequences at a time")
    option("--seconds", type=float, default=20, help="of each measurement but churn")
    option("--adapters", type=int, default=2000, help="of scale and churn")
    option("--resident", type=int, default=200, help="adapters on the device in scale and churn")
    option("--hosted", type=int, default=100, help="adapters in host memory in scale and churn")
    option("--loads", type=int, default=10_000, help="of churn")
    option("--files", type=int, default=32, help="that images lie in")
    option("--adapter-bytes", type=int, default=84 << 20, help="of pinned memory per adapter")
    option("--arena-bytes", type=int, help="of KV and adapters; else what the GPU has left")
    option("--dir", type=Path, default=Path(tempfile.gettempdir()) / "granatum-bench")
    results.add_options(parser)
    args = parser.parse_args()
    if unknown := {*args.only} - {*PARTS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    """Measure, print, and write after each row, so that an interrupted run keeps its results."""
    args = parse_args()
    found = Results(args, KEY)
    try:
        measure(args, found)
    finally:
        shutil.rmtree(args.dir / "images", ignore_errors=True)
        found.print_table(COLUMNS)


if __name__ == "__main__":
    main()
