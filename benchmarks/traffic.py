"""Who asks for what, and when: the users of a benchmark.

A user sends one request after another, each when the one before has ended and not before its
`arrival`. A closed loop is many users with many requests each; an open one, many with one each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from workload import adapter_ids, resident_adapters, textgen_lengths

BACKBONE = "backbone"
"""No adapter at all."""
_FASTEST = 400
"""Tokens per second of one user that no system here exceeds."""
_APART_S = 0.004
_SEED = 20


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens in and out, an adapter's number (None: the base model), seconds from the start."""

    prompt: int
    output: int
    adapter: int | None = None
    arrival: float = 0.0


User = tuple[Request, ...]
Users = tuple[User, ...]


def at_once(requests: int, popularity: str, batch: int) -> Users:
    """Punica's text generation: everything comes at once, for a system that runs `batch`.

    Or almost, so that whoever serves them has them in one order.
    """
    prompts, outputs = (lengths.tolist() for lengths in textgen_lengths(requests))
    adapters = _adapters(popularity, outputs, batch)
    arrivals = [i * _APART_S for i in range(requests)]
    together = zip(prompts, outputs, adapters, arrivals, strict=True)
    return tuple((Request(*one),) for one in together)


def steady(batch: int, popularity: str, seconds: float) -> Users:
    """`batch` users with Punica's requests, the first ones somewhere between start and end.

    What a first request has behind it is part of its prompt, so that contexts are as long from the
    first step on as they are in the long run.
    """
    adapters = _assigned(popularity, batch)
    lengths = _endless(textgen_lengths(64 * batch))
    progress = np.random.default_rng(_SEED).random(batch)
    users = []
    for done, adapter in zip(progress, adapters, strict=True):
        requests, left = [], seconds * _FASTEST
        while left > 0:
            prompt, output = next(lengths)
            requests.append(Request(prompt, output, adapter))
            left -= output
        behind = int(done * requests[0].output)
        first = replace(requests[0], prompt=requests[0].prompt + behind)
        users.append((replace(first, output=first.output - behind), *requests[1:]))
    return tuple(users)


def closed(adapters: Sequence[Iterator[int]], seconds: float) -> Users:
    """A user per iterator of adapters, with requests of S-LoRA's lengths, 8 to 511 in and out."""
    rng = np.random.default_rng(_SEED)
    users = []
    for chosen in adapters:
        requests, left = [], seconds * _FASTEST
        while left > 0:
            prompt, output = rng.integers(8, 512, 2).tolist()
            requests.append(Request(prompt, output, next(chosen)))
            left -= output
        users.append(tuple(requests))
    return tuple(users)


def poisson(rate: float, seconds: float, adapters: int) -> Users:
    """`rate` requests per second of S-LoRA's lengths, each with any of `adapters`."""
    rng = np.random.default_rng(_SEED)
    count = max(int(rate * seconds), 1)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    prompts, outputs = rng.integers(8, 512, (2, count)).tolist()
    chosen = rng.integers(0, adapters, count).tolist()
    requests = zip(prompts, outputs, chosen, arrivals, strict=True)
    return tuple((Request(*one),) for one in requests)


def decoders(count: int, prompt: int, seconds: float) -> Users:
    """Users that decode from `prompt` tokens on until they are stopped, each with its adapter."""
    output = int(seconds * _FASTEST)
    return tuple((Request(prompt, output, i),) for i in range(count))


def arriving(
    every: float, seconds: float, prompt: int, output: int, adapters: Sequence[int]
) -> Users:
    """One request every `every` seconds, the adapters in turn, after a second of peace."""
    count = int((seconds - 1) / every)
    return tuple(
        (Request(prompt, output, adapters[i % len(adapters)], 1 + i * every),) for i in range(count)
    )


def zipf(count: int, exponent: float, seed: int) -> Iterator[int]:
    """Numbers below `count`, number k as often as (k + 1)^-exponent says; 0: all alike."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, count + 1) ** -exponent
    while True:
        yield from rng.choice(count, 256, p=weights / weights.sum()).tolist()


def _adapters(popularity: str, outputs: list[int], batch: int) -> Sequence[int | None]:
    if popularity == BACKBONE:
        return [None] * len(outputs)
    chosen: list[int | None] = resident_adapters(popularity, outputs, batch).tolist()
    return chosen


def _assigned(popularity: str, batch: int) -> Sequence[int | None]:
    """Each of `batch` users' adapter."""
    if popularity == BACKBONE:
        return [None] * batch
    chosen: list[int | None] = adapter_ids(popularity, batch).tolist()
    return chosen


def _endless(lengths: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[int, int]]:
    pairs = list(zip(*(part.tolist() for part in lengths), strict=True))
    while True:
        yield from pairs
