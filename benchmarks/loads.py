"""Adapters on the move: what loads cost those who decode, those who wait, and the machine.

    python benchmarks/loads.py --out benchmarks/results/h200/loads.json

Real engines with random weights and the real adapter cache and loader, each driven in a process of
its own: one of few adapters for arrivals, one of many for scale and churn. Images lie in
`--files` files on local disk; digests beyond that share them, but every digest has its own pages in
host memory and on the device. Parts, by --only:

* arrivals: `batch` - 1 streams decode while short requests arrive, with no adapter to load
  (`resident`), with one from pinned host memory every 100 ms, and with one from the disk every
  500 ms (read past the operating system's cache). `quiet`: nothing arrives. `added_ms`: to the
  percentiles of the time to the first token, by what must be loaded.
* scale: `batch` users with S-LoRA's lengths over 2,000 adapters, about 200 of them on the device
  at a time, beside the same users with one resident adapter each.
* churn: nothing but loads, and the memory they leave behind.
"""

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import results
import traffic
from adapter_images import FileImages
from child import Part, in_child
from latencies import Record, gaps, percentiles, steady_tokens_per_s, summary
from memory import Memory
from model_directory import write_model
from random_engine import EngineSize, EngineUsers, start_engine
from results import Results, Row
from workload import SHAPES

from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.engine.engine import Engine

KEY = ("scenario", "model", "batch", "tier", "popularity", "adapters")
COLUMNS = (
    *("tokens_per_s", "share", "inter_token_ms_p50", "inter_token_ms_p99", "p99_by_resident"),
    *("ttft_ms_p50", "ttft_ms_p99", "added_ms_p50", "added_ms_p90", "loads"),
    *("device_grown_mib", "pinned_grown_mib", "resident_grown_mib"),
)
PARTS = ("arrivals", "scale", "churn")
PROMPT, ARRIVING_PROMPT, ARRIVING_OUTPUT = 512, 32, 4
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
        self.engine: Engine = start_engine(
            model,
            EngineSize(
                device=args.device,
                batch=args.batch,
                rank=args.rank,
                adapters=slots,
                host_cache_bytes=host_adapters * args.adapter_bytes,
                arena_bytes=args.arena_bytes,
            ),
            lambda shape: self._open(args, shape),
        )
        self.users = EngineUsers(self.engine, config.vocab)

    def _open(self, args: argparse.Namespace, shape: ImageShape) -> FileImages:
        self.images = FileImages(shape, args.rank, args.dir / "images", args.files)
        return self.images

    @property
    def loads(self) -> int:
        """Adapters brought onto the device so far."""
        return self.engine.figures.adapter_loads


def few_adapters(args: argparse.Namespace) -> Rows:
    """Arrivals."""
    on_device = args.batch - 1 + SPARE_SLOTS
    yield from arrivals(Rig(args, on_device, on_device + HOST_ADAPTERS + 8), args)


def many_adapters(args: argparse.Namespace) -> Rows:
    """Scale and churn."""
    rig = Rig(args, args.resident, args.hosted)
    if "scale" in args.only:
        yield from scale(rig, args)
    if "churn" in args.only:
        yield from churn(rig, args)


def arrivals(rig: Rig, args: argparse.Namespace) -> Rows:
    """Loads beside streams."""
    decoding = args.batch - 1
    hosted = range(1000, 1000 + HOST_ADAPTERS)
    on_disk = range(2000, 2000 + int(args.seconds / DISK_EVERY_S))

    def measure(tier: str, every_s: float, adapters: range, seconds: float) -> Row:
        arriving = traffic.arriving(every_s, seconds, ARRIVING_PROMPT, ARRIVING_OUTPUT, adapters)
        streams = traffic.decoders(decoding, PROMPT, seconds)
        before = rig.loads
        records = rig.users.drive((*streams, *arriving), seconds)
        row: Row = {"scenario": "arrivals", "tier": tier, "every_ms": round(every_s * 1e3)}
        row |= _beside(records, decoding)
        return {**row, "loads": rig.loads - before}

    rig.users.touch([*hosted, *range(decoding)])
    quiet = measure("quiet", args.seconds, range(1), max(args.seconds / 3, 2.0))
    yield quiet
    for tier, every_s, adapters in (
        ("host", HOST_EVERY_S, hosted),
        ("disk", DISK_EVERY_S, on_disk),
    ):
        if tier == "disk":
            rig.images.cool()
        resident = measure(f"{tier}: resident instead", every_s, range(1), args.seconds)
        yield resident
        yield _compared(measure(tier, every_s, adapters, args.seconds), resident, quiet)


def _beside(records: list[Record], decoding: int) -> Row:
    """Of the streams after their first second, and of those that arrived."""
    arrived = [r for r in records if r.user >= decoding and r.times]
    first = [r.times[0] - r.sent for r in arrived]
    row: Row = percentiles("inter_token_ms", gaps(records[:decoding], after_s=1.0))
    return {**row, "arrived": len(first), **percentiles("ttft_ms", first)}


def _compared(row: Row, resident: Row, quiet: Row) -> Row:
    """What loads cost the streams, and those who wait for them."""
    for name, other in (("resident", resident), ("quiet", quiet)):
        p99 = "inter_token_ms_p99"
        row[f"p99_by_{name}"] = round(row[p99] / other[p99], 3)
    for p in (50, 90, 99):
        ttft = f"ttft_ms_p{p}"
        row[f"added_ms_p{p}"] = round(row[ttft] - resident[ttft], 3)
    return row


def scale(rig: Rig, args: argparse.Namespace) -> Rows:
    """Many adapters, most of them somewhere else."""
    own: list[Iterator[int]] = [itertools.repeat(i) for i in range(args.batch)]
    rig.users.touch(range(args.batch))
    baseline = 0.0
    for popularity in ("own", "uniform", "zipf 1.0"):
        chosen = own
        if popularity != "own":
            exponent = 0.0 if popularity == "uniform" else 1.0
            chosen = [traffic.zipf(args.adapters, exponent, i) for i in range(args.batch)]
            rig.users.touch(list(itertools.islice(chosen[0], args.resident)))
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


def churn(rig: Rig, args: argparse.Namespace) -> Rows:
    """Loads without end, one token each."""
    chosen = traffic.zipf(args.adapters, 0.0, 0)

    def touch(adapters: int) -> None:
        rig.users.touch(list(itertools.islice(chosen, adapters)))

    touch(2 * args.resident)  # now everything has been in use
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


def measure(args: argparse.Namespace, found: Results) -> None:
    """The parts that were asked for, with the engines that they need."""
    engines: dict[Part, set[str]] = {
        few_adapters: {"arrivals"},
        many_adapters: {"scale", "churn"},
    }
    common = {"model": args.model, "batch": args.batch, "rank": args.rank}
    for engine, parts in engines.items():
        if parts & {*args.only}:
            for row in in_child(engine, args):
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
    option("--files", type=int, default=16, help="that images lie in")
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
