"""The demo: many tenants' adapters on one base model at once, every answer checked.

A box with two runners serves the tiny example model. Each tenant uploads its adapters under its
own key. Then all requests start at the same time, so that batches mix adapters and the plain base
model. The right answers are known (`granatum.examples.tasks`).
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from granatum.cli import demo_view as view
from granatum.cli.box.box import ADMIN, Box
from granatum.cli.box.layout import Layout
from granatum.cli.demo_view import DemoRequest, Mix
from granatum.client.client import Client
from granatum.client.records import Adapter, RunnerStatus
from granatum.examples import tasks
from granatum.v1.errors import GranatumError, NotFound

RUNNERS = 2
WORDS = 6  # per adapter, and for the base model
MAX_TOKENS = 64
TIMEOUT_S = 120.0
MAX_BATCH = 12  # fewer than requests, so that batches stay full and mixed to the end
ARENA_BYTES = 256 << 20  # two runners may share one GPU

TENANTS = tuple(dict.fromkeys(task.tenant for task in tasks.ADAPTER_TASKS))
TASKS = (tasks.BASE, *tasks.ADAPTER_TASKS)


async def run(console: Console, logs: Path | None) -> int:
    """Run it; the process's exit status."""
    view.widen(console)
    with tempfile.TemporaryDirectory(prefix="granatum-demo-") as state:
        requests = _requests()
        layout = Layout(
            model=tasks.BASE_MODEL,
            state=Path(state),
            runners=RUNNERS,
            logs=logs,
            tenants=TENANTS,
            runner_arguments=(
                *("--max-batch", str(MAX_BATCH)),
                *("--arena-bytes", str(ARENA_BYTES)),
            ),
        )
        async with AsyncExitStack() as exits:
            with console.status("starting a router and two runners"):
                box = await exits.enter_async_context(Box(layout, console.print))
            clients = {
                owner: await exits.enter_async_context(
                    Client(box.address, key=key, timeout=TIMEOUT_S)
                )
                for owner, key in box.keys.items()
            }
            return await box.during(_show(console, clients, requests))


async def _show(
    console: Console, clients: Mapping[str, Client], requests: Sequence[DemoRequest]
) -> int:
    adapters = await _upload(console, clients)
    before = await clients[ADMIN].runners()
    async with view.progress(console, requests):
        began = time.monotonic()
        await asyncio.gather(*(_stream(clients[request.tenant], request) for request in requests))
        took = time.monotonic() - began
    mix = Mix.between(before, await _figures_since(clients[ADMIN], time.monotonic()))
    console.print(view.answers(requests))
    view.summary(console, requests, took, mix)
    wrong = [*_wrong_answers(requests), *await _trespasses(console, clients, adapters)]
    wrong += _wrong_mix(requests, mix)
    for complaint in wrong:
        console.print(f"WRONG: {complaint}", style="bold red")
    return 1 if wrong else 0


def _requests() -> list[DemoRequest]:
    """Every task with several words that training never saw, the tasks interleaved."""
    words = iter(tasks.held_out_words(WORDS * len(TASKS)))
    return [
        DemoRequest(task, task.tenant or TENANTS[round_ % len(TENANTS)], next(words))
        for round_ in range(WORDS)
        for task in TASKS
    ]


async def _upload(console: Console, clients: Mapping[str, Client]) -> list[Adapter]:
    """Each tenant uploads its own adapters."""
    adapters = []
    for task in tasks.ADAPTER_TASKS:
        adapter = (await clients[task.tenant].upload(task.name, task.path)).adapter
        adapters.append(adapter)
        console.print(
            f"uploaded  {adapter.full_name:<22} rank {adapter.max_rank:>2}  {task.description}"
        )
    return adapters


async def _stream(client: Client, request: DemoRequest) -> None:
    began = time.monotonic()
    generation = client.generate(
        request.task.prompt(request.word),
        adapter=request.adapter,
        max_tokens=MAX_TOKENS,
        stop=(request.task.stop,),
    )
    try:
        async for token in generation:
            request.first_token_s = request.first_token_s or time.monotonic() - began
            request.tokens += 1
            request.text += token.text
    except GranatumError as error:
        request.error = f"{type(error).__name__}: {error.message}"
    else:
        request.runner = generation.end.runner if generation.end else ""
    request.over = True


async def _figures_since(client: Client, moment: float) -> tuple[RunnerStatus, ...]:
    """The runners' figures, from heartbeats later than `moment`."""
    while True:
        runners = await client.runners()
        if all(runner.heartbeat_age_s < time.monotonic() - moment for runner in runners):
            return runners
        await asyncio.sleep(0.1)


async def _trespasses(
    console: Console, clients: Mapping[str, Client], adapters: Sequence[Adapter]
) -> list[str]:
    """Ask for one tenant's adapter with another tenant's key, by each of its names."""
    adapter = adapters[0]
    stranger = next(tenant for tenant in TENANTS if tenant != adapter.tenant)
    names = (adapter.name, f"{adapter.name}@1", adapter.full_name, adapter.digest)
    wrong = []
    for name in names:
        try:
            await clients[stranger].complete("x", adapter=name, max_tokens=1)
        except NotFound:
            continue
        wrong.append(f"{stranger} could use {adapter.full_name} as {name}")
    if not wrong:
        console.print(
            f"{stranger} asked for {adapter.tenant}'s {adapter.name} by name, version and digest: "
            "NOT_FOUND every time."
        )
    return wrong


def _wrong_answers(requests: Sequence[DemoRequest]) -> Iterator[str]:
    for request in requests:
        what = f"{request.task.name} of {request.word!r}"
        if request.error:
            yield f"{what}: {request.error}"
        elif not request.right:
            yield f"{what}: {request.text!r}, not {request.task.expected(request.word)!r}"


def _wrong_mix(requests: Sequence[DemoRequest], mix: Mix) -> Iterator[str]:
    runners = {request.runner for request in requests} - {""}
    if len(runners) < RUNNERS:
        yield f"only {len(runners)} of {RUNNERS} runners served"
    if mix.adapters < 2:
        yield "batches did not mix adapters"
