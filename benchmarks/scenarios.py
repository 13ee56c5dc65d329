"""What serving.py measures: users, driven against an engine or a service, and what they saw."""

import argparse
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import traffic
from latencies import Record, gaps, lags, percentiles, steady_tokens_per_s, summary
from results import Row
from traffic import BACKBONE, Request, Users

from service import Service

PREFILL, PROMPT = 1000, 512
_TRIALS = 20

Rows = Iterator[Row]


class Driven(Protocol):
    """What users can be driven against."""

    def drive(self, users: Users, seconds: float | None = None) -> list[Record]:
        """Their records."""
        ...


def textgen(driven: Driven, args: argparse.Namespace) -> Rows:
    """Punica's requests at once."""
    for popularity in args.popularities:
        users = traffic.at_once(args.requests, popularity, args.batch)
        found = _without_waits(summary(driven.drive(users)))
        yield {"popularity": popularity, "batch": args.batch, **found}


def steady(driven: Driven, args: argparse.Namespace, batches: list[int]) -> Rows:
    """Users without end."""
    for batch in batches:
        for popularity in args.popularities:
            users = traffic.steady(batch, popularity, args.seconds)
            records = driven.drive(users, args.seconds)
            found = summary([record for record in records if record.index])  # whole requests
            found["tokens_per_s"] = steady_tokens_per_s(records, users)
            found |= percentiles("inter_token_ms", gaps(records))
            yield {"popularity": popularity, "batch": batch, **found}


def ttft(driven: Driven, _: argparse.Namespace) -> Rows:
    """One prompt after another, alone."""
    for popularity, adapter in ((BACKBONE, None), ("identical", 0)):
        users = ((Request(PROMPT, 2, adapter),) * _TRIALS,)
        found = summary(driven.drive(users)[2:])
        times = {name: value for name, value in found.items() if name.startswith("ttft")}
        yield {"popularity": popularity, "batch": 1, "prompt": PROMPT, **times}


def beside(driven: Driven, args: argparse.Namespace) -> Rows:
    """Streams that decode, alone and beside prefills."""
    decoding = args.batch - 1
    streams = traffic.decoders(decoding, PROMPT, args.seconds)
    last = args.batch - 1
    back_to_back = ((Request(PREFILL, 1, last, 1.0),) * int(100 * args.seconds),)
    beside: dict[str, Users] = {"none": (), "back to back": back_to_back}
    for rate in (2, 8):
        arrivals = traffic.arriving(1 / rate, args.seconds, PREFILL, 1, [last])
        beside[f"{rate} per s"] = arrivals
    for name, prefills in beside.items():
        records = driven.drive((*streams, *prefills), args.seconds)
        times = gaps([record for record in records if record.user < decoding], after_s=1.0)
        row: Row = {"popularity": "distinct", "batch": args.batch, "prefills": name}
        row |= percentiles("inter_token_ms", times)
        row["p99_by_p50"] = round(float(np.quantile(times, 0.99) / np.median(times)), 3)
        first = [r.times[0] - r.sent for r in records if r.user >= decoding and r.times]
        yield {**row, "prefilled": len(first), **percentiles("ttft_ms", first)}


def open_loop(driven: Driven, args: argparse.Namespace) -> Rows:
    """Poisson arrivals."""
    for rate in args.rates:
        users = traffic.poisson(rate, args.seconds, args.batch)
        found = summary(driven.drive(users))
        yield {"popularity": "uniform", "batch": args.batch, "rate": rate, **found}


def router_latency(service: Service, args: argparse.Namespace) -> Rows:
    """What the router adds: streams through it and one past it, in the same engine steps."""
    users = traffic.decoders(args.batch - 1, PROMPT, args.seconds)
    twin = Request(PROMPT, int(args.seconds * 400), args.batch - 1)
    records, reference = service.drive_twin(users, twin, args.seconds)
    row: Row = {"popularity": "distinct", "batch": args.batch}
    row |= percentiles("inter_token_ms", gaps(records))
    yield {**row, **percentiles("added_ms", lags(reference, records))}


def past_router(service: Service, args: argparse.Namespace) -> Rows:
    """Text generation by the runner alone, over one session."""
    users = traffic.at_once(args.requests, "distinct", args.batch)
    found = _without_waits(summary(service.drive_past(users)))
    yield {"popularity": "distinct", "batch": args.batch, **found}


def _without_waits(found: Row) -> Row:
    """The first tokens of requests that come all at once wait in a queue of our own making."""
    return {name: value for name, value in found.items() if not name.startswith("ttft")}
