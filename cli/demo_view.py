"""What the demo shows: progress while it runs, then every answer."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from granatum.client.records import RunnerStatus
from granatum.examples import tasks
from granatum.examples.tasks import Task

_WIDTH = 118  # of the table of answers
_FRAME_S = 0.1
_LINE_S = 1.0
_LEFT = ("tenant", "adapter", "runner", "prompt", "completion")
_RIGHT = ("tokens", "first token")


@dataclass(slots=True)
class DemoRequest:
    """One request of the demo, and its answer so far."""

    task: Task
    tenant: str
    word: str
    text: str = ""
    tokens: int = 0
    first_token_s: float = 0.0
    runner: str = ""
    error: str = ""
    over: bool = False

    @property
    def adapter(self) -> str:
        """Its adapter's name; empty for the base model."""
        return "" if self.task is tasks.BASE else self.task.name

    @property
    def right(self) -> bool:
        """Whether the answer is complete and right."""
        return self.over and not self.error and self.text == self.task.expected(self.word)


@dataclass(frozen=True, slots=True)
class Mix:
    """The distinct adapters and the sequences in an average decode step of the runners."""

    adapters: float
    sequences: float

    @classmethod
    def between(cls, before: Sequence[RunnerStatus], after: Sequence[RunnerStatus]) -> "Mix":
        """The average over the steps between two readings of the runners' figures."""
        steps = _sum(after, "decode_steps") - _sum(before, "decode_steps")
        adapters = _sum(after, "decode_adapters") - _sum(before, "decode_adapters")
        sequences = _sum(after, "decode_sequences") - _sum(before, "decode_sequences")
        return cls(adapters / max(steps, 1), sequences / max(steps, 1))


def widen(console: Console) -> None:
    """Make room for the table where no terminal sets the width."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)


@asynccontextmanager
async def progress(console: Console, requests: Sequence[DemoRequest]) -> AsyncIterator[None]:
    """A live table in a terminal, else a line now and then."""
    watching = asyncio.create_task(
        _animate(console, requests) if console.is_terminal else _narrate(console, requests)
    )
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait((watching,))


def answers(requests: Sequence[DemoRequest]) -> Table:
    """Every request and its answer, by adapter."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in _LEFT:
        table.add_column(title, no_wrap=True)
    for title in _RIGHT:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column()
    for request in sorted(requests, key=lambda request: (request.adapter, request.tenant)):
        table.add_row(
            request.tenant,
            request.adapter or Text("base model", style="dim"),
            request.runner,
            request.task.prompt(request.word),
            request.error or request.text,
            str(request.tokens),
            f"{request.first_token_s * 1000:.0f} ms",
            Text("right", style="green") if request.right else Text("WRONG", style="bold red"),
        )
    return table


def summary(console: Console, requests: Sequence[DemoRequest], took_s: float, mix: Mix) -> None:
    """The run in two sentences."""
    right = sum(request.right for request in requests)
    adapters = {request.adapter for request in requests} - {""}
    console.print(
        f"\n{right} of {len(requests)} answers are right: {len(adapters)} adapters and the base "
        f"model, for {len({request.tenant for request in requests})} tenants, "
        f"{sum(request.tokens for request in requests)} tokens in {took_s:.1f} s."
    )
    console.print(
        f"On average {mix.adapters:.1f} distinct adapters shared a decode step "
        f"of {mix.sequences:.1f} sequences.",
        style="bold",
    )


async def _animate(console: Console, requests: Sequence[DemoRequest]) -> None:
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(_snapshot(requests), refresh=True)
            await asyncio.sleep(_FRAME_S)


async def _narrate(console: Console, requests: Sequence[DemoRequest]) -> None:
    while True:
        over = sum(request.over for request in requests)
        tokens = sum(request.tokens for request in requests)
        console.print(f"streaming {over} of {len(requests)} complete, {tokens} tokens")
        await asyncio.sleep(_LINE_S)


def _snapshot(requests: Sequence[DemoRequest]) -> Table:
    """One row per adapter: how many of its requests are complete, and what they say now."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for task in dict.fromkeys(request.task.name for request in requests):
        own = [request for request in requests if request.task.name == task]
        texts = "  ".join(request.text or "..." for request in own)
        table.add_row(own[0].adapter or "base model", _marks(own), Text(texts, no_wrap=True))
    return table


def _marks(requests: Sequence[DemoRequest]) -> Text:
    marks = Text()
    for request in requests:
        if not request.over:
            marks.append("·")
        else:
            marks.append("✓" if request.right else "✗", style="green" if request.right else "red")
    return marks


def _sum(runners: Sequence[RunnerStatus], figure: str) -> int:
    return sum(int(getattr(runner, figure)) for runner in runners)
