"""What a hostile tenant costs its neighbours, through the whole service on a CPU.

    python benchmarks/neighbours.py --device cpu --out benchmarks/results/cpu/neighbours.json

The tiny example model, one router, one runner. For each attack of `attacks.py`:

* first_token_ms, p50, p90 and largest, of a tenant with one request at a time; without an attack
  in the row "none".
* gap: of 31 streams, the longest pause of any between two tokens, over that stream's median.
* burst: how each of 3,000 streams ends that are opened at once.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import results
from attacks import QUEUED, QUEUED_TOKENS, run
from results import Results, Row

from granatum.cli.box.box import Box
from granatum.cli.box.layout import Layout
from granatum.client.client import Client
from granatum.examples.tasks import BASE_MODEL
from granatum.v1.errors import GranatumError

VICTIM, ATTACKER = "victim", "attacker"
STREAMS = 31
BURST = 3_000
_ATTACK_S = 15.0
_UNDER_WAY_S = 3.0


async def first_tokens(client: Client, requests: int) -> list[float]:
    """Seconds to the first token of requests one after another."""
    waited = []
    for number in range(requests):
        began = time.monotonic()
        async for _ in client.generate("velvet>", max_tokens=1, timeout=60, seed=number):
            waited.append(time.monotonic() - began)
        await asyncio.sleep(0.1)
    return waited


def first_token_row(attack: str, waited: list[float]) -> Row:
    """What is said of first tokens."""
    p50, p90 = (float(np.percentile(waited, p)) for p in (50, 90))
    figures = {"p50_ms": p50 * 1e3, "p90_ms": p90 * 1e3, "largest_ms": max(waited) * 1e3}
    return {"what": "first_token_ms", "attack": attack, "requests": len(waited), **figures}


@contextmanager
def attacking(name: str, box: Box, seconds: float) -> Iterator[None]:
    """An attack goes on."""
    arguments = (name, box.address, box.keys[ATTACKER], seconds)
    attacker = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
    attacker.start()
    try:
        yield
    finally:
        attacker.kill()
        attacker.join()


async def beside(name: str, box: Box, client: Client, requests: int) -> Row:
    """First tokens beside an attack."""
    with attacking(name, box, _ATTACK_S + requests):
        await asyncio.sleep(_UNDER_WAY_S)
        return first_token_row(name, await first_tokens(client, requests))


async def turn_s(client: Client, batch: int) -> float:
    """How long a full batch of requests like those of the attack "queue" takes."""
    began = time.monotonic()
    asked = [
        client.complete("granite>", max_tokens=QUEUED_TOKENS, ignore_eos=True) for _ in range(batch)
    ]
    await asyncio.gather(*asked)
    return time.monotonic() - began


async def gaps(client: Client, tokens: int) -> list[float]:
    """Of each of the streams, its longest pause over its median one."""

    async def one(number: int) -> float:
        times = []
        stream = client.generate("granite>", max_tokens=tokens, ignore_eos=True, seed=number)
        async for _ in stream:
            times.append(time.monotonic())
        pauses = np.diff(times)
        return float(pauses.max() / statistics.median(pauses))

    return await asyncio.gather(*(one(number) for number in range(STREAMS)))


async def burst(client: Client) -> Counter[str]:
    """How streams end that are opened at once."""

    async def one(number: int) -> str:
        try:
            await client.complete("granite>", max_tokens=1, seed=number, timeout=120)
        except GranatumError as error:
            hint = "with a hint" if error.retry_after_s else "without a hint"
            return f"{type(error).__name__} {error.reason} {hint}"
        return "complete"

    return Counter(await asyncio.gather(*(one(number) for number in range(BURST))))


async def measure(args: argparse.Namespace, found: Results) -> None:
    """Every attack on one box."""
    with TemporaryDirectory(prefix="granatum-bench-") as directory:
        layout = Layout(
            model=BASE_MODEL,
            state=Path(directory),
            runners=1,
            tenants=(VICTIM, ATTACKER),
            runner_arguments=("--max-batch", str(args.batch), "--device", args.device),
        )
        async with (
            Box(layout, print) as box,
            Client(box.address, key=box.keys[VICTIM]) as client,
        ):
            await first_tokens(client, 5)
            found.add(first_token_row("none", await first_tokens(client, args.requests)))
            for attack in ("churn", "unread", "patterns"):
                found.add(await beside(attack, box, client, args.requests))
                await asyncio.sleep(_UNDER_WAY_S)
            turn = await turn_s(client, args.batch)
            row = await beside("queue", box, client, 1)
            found.add({**row, "queued": QUEUED, "batch": args.batch, "turn_ms": turn * 1e3})
            await asyncio.sleep(2 * _UNDER_WAY_S)
            found.add(_gap_row("none", await gaps(client, args.tokens)))
            with attacking("long prompts", box, _ATTACK_S * 4):
                await asyncio.sleep(_UNDER_WAY_S)
                found.add(_gap_row("long prompts", await gaps(client, args.tokens)))
            ends = await burst(client)
            found.add({"what": "burst", "attack": "none", "streams": BURST, "ends": dict(ends)})


def _gap_row(attack: str, ratios: list[float]) -> Row:
    return {"what": "gap", "attack": attack, "streams": STREAMS, "gap": max(ratios)}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="sequences at a time")
    parser.add_argument("--requests", type=int, default=30, help="first tokens per attack")
    parser.add_argument("--tokens", type=int, default=200, help="of each stream with gaps")
    results.add_options(parser)
    args = parser.parse_args()
    found = Results(args, key=("what", "attack"))
    asyncio.run(measure(args, found))
    found.print_table(("p50_ms", "p90_ms", "largest_ms", "turn_ms", "gap"))


if __name__ == "__main__":
    main()
