"""Serving with an adapter per request: the engine alone, and the whole service around it.

    python benchmarks/serving.py --out benchmarks/results/h200/serving.json

Weights and adapters are random numbers. Parts, by --only:

* engine: a real engine in a process of its own, driven directly.
* curve: the same engine for batches beyond --batch, as many distinct adapters as sequences.
* service: client processes -> router -> runner over gRPC on loopback, an embedded Valkey;
  adapters come in by the upload call. `share` is its throughput by that of the engine part, of
  the same run if that has one.
* host: the service with an engine that computes nothing (`--step-ms` a step): what front, router
  and client carry.

Scenarios, by --scenarios:

* textgen: (prompt + output) tokens per second of Punica's requests, all there at once, `batch` at
  a time, from the first prefill to the last token.
* steady: the same users in the long run, for --seconds.
* ttft: milliseconds to the first token of a 512-token prompt that comes alone.
* beside: inter-token times of `batch` - 1 streams while 1,000-token prompts come, back to back or
  at a rate.
* open: Poisson arrivals at --rates per second, S-LoRA's lengths.
* router: by how much tokens through the router come after those of the same engine step past it.
"""

import argparse
import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import results
from adapter_images import MemoryTwins
from child import in_child
from latencies import percentiles
from model_directory import write_model
from paced_runner import STEP_MS, PacedBox
from random_engine import EngineSize, EngineUsers, start_engine
from results import Results, Row
from scenarios import (
    Rows,
    beside,
    open_loop,
    past_router,
    router_latency,
    steady,
    textgen,
    ttft,
)
from traffic import BACKBONE
from workload import POPULARITIES, SHAPES

from granatum.cli.box.box import Box
from service import ServiceSize, running_service

KEY = ("mode", "scenario", "model", "popularity", "batch", "rate", "prefills")
COLUMNS = (
    *("tokens_per_s", "share", "ttft_ms_p50", "ttft_ms_p99"),
    *("inter_token_ms_p50", "inter_token_ms_p99", "added_ms_p50", "added_ms_p99"),
)
PARTS = ("engine", "curve", "service", "host")
SCENARIOS = ("textgen", "steady", "ttft", "beside", "open", "router")
_GIB = 1 << 30


def engine_rows(args: argparse.Namespace) -> Rows:
    """The engine part."""
    users = start(args, args.batch)
    users.touch(range(args.batch))
    scenarios: dict[str, Callable[..., Rows]] = {
        "textgen": textgen,
        "steady": partial(steady, batches=[args.batch]),
        "ttft": ttft,
        "beside": beside,
        "open": open_loop,
    }
    yield from _named("engine", scenarios, args, users)


def curve_rows(args: argparse.Namespace) -> Rows:
    """The curve part."""
    users = start(args, max(args.batches))
    users.touch(range(max(args.batches)))
    scenarios = {"steady": partial(steady, batches=args.batches)}
    yield from _named("curve", scenarios, args, users)


def start(args: argparse.Namespace, batch: int) -> EngineUsers:
    """An engine for `batch` sequences and adapters."""
    size = EngineSize(
        device=args.device,
        batch=batch,
        rank=args.rank,
        adapters=batch,
        host_bytes=args.host_bytes,
        step_tokens=max(args.step_tokens, batch),
    )
    model = write_model(args.dir / args.model, SHAPES[args.model])
    engine = start_engine(model, size, lambda shape: MemoryTwins(shape, args.rank))
    return EngineUsers(engine, SHAPES[args.model].vocab)


async def service_rows(args: argparse.Namespace, mode: str, add: Callable[[Row], None]) -> None:
    """The service part, and with an engine that computes nothing the host part."""
    box_class = {"service": Box, "host": PacedBox}[mode]
    size = ServiceSize(
        model=write_model(args.dir / args.model, SHAPES[args.model]),
        vocab=SHAPES[args.model].vocab,
        rank=args.rank,
        adapters=args.batch,
        runner_arguments=(
            *("--max-batch", str(args.batch), "--max-rank", str(args.rank)),
            *("--prefill-tokens", str(max(args.step_tokens, args.batch))),
            *("--host-cache-bytes", str(args.host_bytes)),
        ),
    )
    scenarios: dict[str, Callable[..., Rows]] = {
        "textgen": textgen,
        "textgen past the router": past_router,
        "steady": partial(steady, batches=[args.batch]),
        "ttft": ttft,
        "beside": beside,
        "open": open_loop,
        "router": router_latency,
    }
    if mode == "host":  # the others measure the engine
        scenarios = {name: scenarios[name] for name in scenarios if name not in ("beside", "open")}
    with ProcessPoolExecutor(
        args.clients + 1, mp_context=multiprocessing.get_context("spawn")
    ) as processes:
        async with running_service(size, processes, args.clients, box_class) as service:
            row: Row = {"mode": mode, "scenario": "start", "model": args.model}
            row |= {"start_s": round(service.start_s, 1)}
            add({**row, **percentiles("upload_ms", service.upload_s)})
            await asyncio.to_thread(_add_all, _named(mode, scenarios, args, service), add)


def _add_all(rows: Rows, add: Callable[[Row], None]) -> None:
    for row in rows:
        add(row)


def _named(
    mode: str,
    scenarios: Mapping[str, Callable[..., Rows]],
    args: argparse.Namespace,
    driven: object,
) -> Rows:
    """The rows of those scenarios that were asked for, with what names them."""
    for name, scenario in scenarios.items():
        if name.split()[0] in args.scenarios:
            for row in scenario(driven, args):
                common = {"mode": mode, "scenario": name, "model": args.model}
                yield {**common, "rank": args.rank, **row}


def add_share(row: Row, rows: list[Row]) -> Row:
    """A service's row with its throughput by that of the engine's own row, if there is one."""
    for own in rows:
        same = all(own.get(name) == row.get(name) for name in ("model", "popularity", "batch"))
        scenario = row["scenario"].startswith(own["scenario"]) and "tokens_per_s" in own
        rate = own.get("rate") == row.get("rate")
        if own["mode"] == "engine" and row["mode"] == "service" and same and scenario and rate:
            return {**row, "share": round(row["tokens_per_s"] / own["tokens_per_s"], 4)}
    return row


def measure(args: argparse.Namespace, found: Results) -> None:
    """All parts that were asked for."""
    if "engine" in args.only:
        _add_all(in_child(engine_rows, args), found.add)
    if "curve" in args.only:
        _add_all(in_child(curve_rows, args), found.add)
    for mode in ("service", "host"):
        if mode in args.only:
            asyncio.run(
                service_rows(args, mode, lambda row: found.add(add_share(row, found.all_rows)))
            )


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
    option("--only", type=names, default=["engine", "service"], help=", ".join(PARTS))
    option("--scenarios", type=names, default=list(SCENARIOS), help=", ".join(SCENARIOS))
    option("--model", choices=SHAPES, default="7b")
    option("--rank", type=int, default=16, help="of every projection")
    option("--batch", type=int, default=32, help="sequences, and adapters, at a time")
    option("--batches", type=numbers, default=[64, 128, 256], help="of the curve")
    option("--popularities", type=names, default=["distinct", "identical", BACKBONE],
           help=", ".join((BACKBONE, *POPULARITIES)))  # fmt: skip
    option("--requests", type=int, default=128, help="of textgen")
    option("--rates", type=numbers, default=[4, 8, 12], help="requests per second of open")
    option("--seconds", type=float, default=20, help="of each measurement but textgen and ttft")
    option("--step-tokens", type=int, default=512, help="rows of a step at most")
    option("--step-ms", type=float, default=0.0, help="of an engine that computes nothing")
    option("--host-bytes", type=int, default=4 * _GIB, help="of pinned memory for adapters")
    option("--clients", type=int, default=4, help="processes of users")
    option("--dir", type=Path, default=Path(tempfile.gettempdir()) / "granatum-bench")
    results.add_options(parser)
    args = parser.parse_args()
    if unknown := {*args.only} - {*PARTS} or {*args.scenarios} - {*SCENARIOS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    """Measure, print, and write after each row, so that an interrupted run keeps its results."""
    args = parse_args()
    os.environ[STEP_MS] = str(args.step_ms)
    found = Results(args, KEY)
    try:
        measure(args, found)
    finally:
        found.print_table(COLUMNS)


if __name__ == "__main__":
    main()
