"""Batches of LoRA work on a Llama layer's fused linears, and their time inside CUDA graphs."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lora_harness import Packed, pack
from workload import SHAPES, adapter_ids

from granatum.models.families import LLAMA

GROUPS = tuple(group.name for group in LLAMA.groups)
SCALE = 0.5
PROMPT = 128
_TRIALS = 3
_TRIAL_MS = 5.0
_MAX_LAUNCHES = 160
_TURNS = 40


@dataclass(frozen=True)
class Linear:
    """A fused linear and the rank of every adapter on it."""

    model: str
    group: str
    rank: int

    @property
    def in_features(self) -> int:
        """Columns of x."""
        return SHAPES[self.model].in_features[self.group]

    @property
    def out_features(self) -> tuple[int, ...]:
        """Columns of y, by projection."""
        return SHAPES[self.model].out_features[self.group]

    @property
    def group_index(self) -> int:
        """The group as the adapter table counts them."""
        return GROUPS.index(self.group)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of an adapter's A and B in 16 bits."""
        values = len(self.out_features) * self.in_features + sum(self.out_features)
        return 2 * self.rank * values


@dataclass(frozen=True)
class Batch:
    """Which adapter each row of a step uses."""

    name: str
    adapters: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of x and y."""
        return len(self.adapters)

    @property
    def distinct(self) -> int:
        """Adapters in use."""
        return len(set(self.adapters))

    def necessary_bytes(self, linear: Linear) -> int:
        """Bytes that must move: adapters and x read once, y read and written once."""
        activations = self.rows * (linear.in_features + 2 * sum(linear.out_features))
        return self.distinct * linear.adapter_bytes + 2 * activations


def decode(rows: int, popularity: str) -> Batch:
    """One row per request, in order of arrival."""
    return Batch(f"{rows} {popularity}", tuple(adapter_ids(popularity, rows).tolist()))


def prefill(rows: int, popularity: str) -> Batch:
    """Prompts of `PROMPT` rows each, in order of arrival."""
    ids = adapter_ids(popularity, rows // PROMPT).repeat(PROMPT)
    return Batch(f"{rows} {popularity}", tuple(ids.tolist()))


@dataclass(frozen=True)
class Matrices:
    """Adapters of a linear: a[p] is [adapters, rank, in], b[p] is [adapters, out, rank]."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]


def make_matrices(linear: Linear, adapters: int) -> Matrices:
    """Random adapters, on the GPU, in bfloat16, whose effect on y has deviation about SCALE."""

    def values(rows: int, columns: int) -> torch.Tensor:
        made = torch.randn(adapters, rows, columns, dtype=torch.bfloat16, device="cuda")
        return made.mul_(columns**-0.5)

    return Matrices(
        tuple(values(linear.rank, linear.in_features) for _ in linear.out_features),
        tuple(values(n, linear.rank) for n in linear.out_features),
    )


def pack_matrices(matrices: Matrices) -> Packed:
    """The adapters in an arena."""
    return pack([matrices], SCALE)


def truth(batch: Batch, matrices: Matrices, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What y shall be, in float32, if slot s holds adapter s."""
    expected = y.float()
    rows = torch.tensor(batch.adapters, device=x.device)
    for adapter in set(batch.adapters):
        mine = (rows == adapter).nonzero().squeeze(1)
        deltas = [
            x[mine].float() @ a[adapter].float().T @ b[adapter].float().T
            for a, b in zip(matrices.a, matrices.b, strict=True)
        ]
        expected[mine] += SCALE * torch.cat(deltas, dim=1)
    return expected


def activations(linear: Linear, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Random x and y."""
    widths = (linear.in_features, sum(linear.out_features))
    x, y = (torch.randn(batch.rows, n, dtype=torch.bfloat16, device="cuda") for n in widths)
    return x, y


def layers_of(batch: Batch, adapters: int) -> int:
    """Layers whose adapters a pool of that many holds, at most as many as a graph should."""
    return max(1, min(adapters // batch.distinct, _MAX_LAUNCHES))


def graph_us(launches: Sequence[Callable[[], object]]) -> float:
    """Microseconds per launch inside one CUDA graph of them all: the median of a few trials."""
    graph = _capture(launches)
    _replay_ms(graph, 1)
    replays = math.ceil(_TRIAL_MS / _replay_ms(graph, 1))
    trials = [_replay_ms(graph, replays) for _ in range(_TRIALS)]
    return statistics.median(trials) / (replays * len(launches)) * 1e3


def alternating_us(*lists: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds per launch of each list, in a graph of its own; medians of replays in turn.

    So that all of them meet the clocks to which heavy matrix products drive the GPU.
    """
    graphs = [_capture(launches) for launches in lists]
    trials = [[_replay_ms(graph, 1) for graph in graphs] for _ in range(_TURNS)][_TURNS // 4 :]
    medians = map(statistics.median, zip(*trials, strict=True))
    return [ms / len(own) * 1e3 for ms, own in zip(medians, lists, strict=True)]


def _capture(launches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def read_bandwidth() -> float:
    """Bytes per second of a plain sum over 4 GiB."""
    values = torch.randn(1 << 30, device="cuda")
    total = torch.empty((), device="cuda")
    return values.numel() * 4 / graph_us([lambda: total.copy_(values.sum())]) * 1e6
