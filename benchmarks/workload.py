"""What the benchmarks run: model shapes, and who uses which adapter for how long.

Lengths and popularity are those of Punica's text-generation benchmark (github.com/punica-ai/punica,
benchmarks/bench_textgen*.py), number for number, so that results can be compared.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from granatum.models.config import ModelConfig
from granatum.models.rope import Rope
from granatum.models.scalings import Llama3

Ints = npt.NDArray[np.int32]

POPULARITIES = ("distinct", "uniform", "skewed", "identical")
MAX_LENGTH = 2048
SEED = 0xABCDABCD987
_LLAMA3 = Rope(5e5, Llama3(8.0, 1.0, 4.0, 8192))

SHAPES = {
    "7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, Rope(1e4)),
    "8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, _LLAMA3),
    "tiny": ModelConfig(512, 64, 128, 2, 4, 2, 16, 4096, 1e-5, Rope(1e4)),
}
"""Llama 2 7B, Llama 3.1 8B, and one for dry runs."""


def textgen_lengths(requests: int) -> tuple[Ints, Ints]:
    """Prompt and output tokens of each request.

    Prompts are log-normal around 17 tokens; prompt and output together are uniform below
    `MAX_LENGTH`; there is always at least one of each.
    """
    rng = np.random.Generator(np.random.PCG64(SEED))
    lengths = []
    for _ in range(requests):
        prompt = max(1.0, 18.0 * math.exp(0.8 * rng.standard_normal()) - 1.0)
        prompt = min(prompt, MAX_LENGTH - 2.0)
        total = max(prompt + 2.0, float(rng.integers(0, MAX_LENGTH)))
        lengths.append((prompt, total - prompt))
    prompts, outputs = np.array(lengths).astype(np.int32).T
    return prompts, outputs


def running_lengths(batch: int) -> list[int]:
    """Tokens so far of `batch` requests of text generation, at any moment of it.

    A request is met as often as it runs long, and has made any part of its output by then; these
    are that distribution's quantiles, so that batches of any size compare.
    """
    prompts, outputs = textgen_lengths(4096)
    rng = np.random.Generator(np.random.PCG64(SEED + 1))
    met = rng.choice(len(outputs), 4096, p=outputs / outputs.sum())
    made = (rng.random(4096) * outputs[met]).astype(np.int32)
    lengths: list[int] = np.quantile(prompts[met] + made, (np.arange(batch) + 0.5) / batch).tolist()
    return [int(lengths[i]) for i in rng.permutation(batch)]


def adapter_counts(popularity: str, requests: int) -> list[int]:
    """Requests of each adapter, the most popular first."""
    match popularity:
        case "distinct":
            return [1] * requests
        case "identical":
            return [requests]
        case "uniform":
            adapters = math.ceil(math.sqrt(requests))
            return [requests // adapters + (i < requests % adapters) for i in range(adapters)]
        case "skewed":
            return _geometric(requests, 1.5)
    raise ValueError(f"unknown popularity {popularity!r}: one of {', '.join(POPULARITIES)}")


def _geometric(requests: int, base: float) -> list[int]:
    """Whole parts of the powers of `base`, as many as fit, and the rest."""
    counts: list[int] = []
    left, power = requests, 1.0
    while int(power) < left:
        counts.append(int(power))
        left -= counts[-1]
        power *= base
    return sorted([*counts, left], reverse=True)


def adapter_ids(popularity: str, requests: int) -> Ints:
    """The adapter of each request, in order of arrival."""
    counts = adapter_counts(popularity, requests)
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.Generator(np.random.PCG64(SEED)).shuffle(ids)
    return ids


def resident_adapters(popularity: str, outputs: Sequence[int] | Ints, batch: int) -> Ints:
    """The adapter of each request when `batch` adapters exist and none is ever loaded.

    Under "distinct", requests that run together differ: each takes the adapter of the seat that
    it gets when `batch` of them run at a time, first come, first served.
    """
    if popularity != "distinct":
        return adapter_ids(popularity, len(outputs))
    free = [(0, seat) for seat in range(batch)]
    seats = []
    for tokens in outputs:
        step, seat = heapq.heappop(free)
        seats.append(seat)
        heapq.heappush(free, (step + int(tokens), seat))
    return np.array(seats, dtype=np.int32)
