"""Finds how decode attention is best cut into blocks on this GPU, by measuring it.

    python benchmarks/attention_tune.py [--batches 32,1,8] [--context 592]

Times decode attention over scattered pages, in a CUDA graph over enough layers that the L2 cache
does not serve them, for heads with keys of their own (7B) and grouped ones (8B): once with
sequences that are all of one length, once with lengths as text generation has them at any moment.
Each configuration is checked against float32 first. `kernels/attention/decode.py` names the best.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from multiprocessing import get_context

import lora_ops_cases as cases
import numpy as np
import torch
from workload import MAX_LENGTH, SEED, SHAPES, textgen_lengths

from granatum.kernels.attention.decode import DecodeConfig, allocate_decode_workspace, launch_decode
from granatum.kernels.attention.reference import decode_attention
from granatum.kernels.device import gpu
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv

PAGE_TOKENS = 16
POOL_BYTES = 300e6
PIECES = (128, 192, 256, 384, 512, 1024, 2048)
_COMPILERS = 14


def configs(grouped: bool) -> Iterator[DecodeConfig]:
    """All that are compiled, for `blocks` and `piece` to vary."""
    for block_t in (16, 32, 64) if grouped else (8, 16, 32):
        for stages in (1,) if grouped else (1, 2, 3):
            yield DecodeConfig(block_t, stages, 0, 0)


def equal_lengths(batch: int, context: int) -> list[int]:
    """All of one length."""
    return [context] * batch


def unlike_lengths(batch: int) -> list[int]:
    """As text generation's running requests are long: each chosen by how long it runs."""
    prompts, outputs = textgen_lengths(512)
    rng = np.random.Generator(np.random.PCG64(SEED))
    chosen = rng.choice(len(outputs), batch, p=outputs / outputs.sum())
    made = (rng.random(batch) * outputs[chosen]).astype(int)
    lengths: list[int] = np.minimum(prompts[chosen] + made + 1, MAX_LENGTH).tolist()
    return lengths


@dataclass
class Bench:
    """Sequences of some lengths, their pages scattered over an arena of some layers."""

    model: str
    lengths: list[int]

    def __post_init__(self) -> None:
        """Make the arena."""
        shape, batch = SHAPES[self.model], len(self.lengths)
        self.kv_heads, self.heads, d = shape.kv_heads, shape.heads, shape.head_dim
        self.bytes = sum(self.lengths) * 4 * self.kv_heads * d
        self.layers = max(2, math.ceil(POOL_BYTES / self.bytes))
        elements = self.layers * 2 * self.kv_heads * PAGE_TOKENS * d
        self.kv = KvLayout(elements, PAGE_TOKENS, self.kv_heads, d)
        counts = [-(-length // PAGE_TOKENS) for length in self.lengths]
        pages = sum(counts)
        self.arena = torch.randn(pages, elements, dtype=torch.bfloat16, device="cuda")
        order = torch.split(torch.randperm(pages, device="cuda").int(), counts)
        self.table = torch.zeros(batch, 4096 // PAGE_TOKENS, dtype=torch.int32, device="cuda")
        for row, own in zip(self.table, order, strict=True):
            row[: len(own)] = own
        self.tokens = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")
        widths = [self.heads * d, self.kv_heads * d, self.kv_heads * d]
        wide = torch.randn(batch, sum(widths), dtype=torch.bfloat16, device="cuda")
        self.q, self.k, self.v = torch.split(wide, widths, dim=1)
        angles = torch.randn(MAX_LENGTH, d // 2, device="cuda")
        self.rotary = Rotary(angles.cos(), angles.sin())
        self.out = torch.empty(batch, self.heads * d, dtype=torch.bfloat16, device="cuda")
        self.expected = torch.empty_like(self.out)
        decode_attention(
            self.q, self.k, self.v, self.rotary, LayerKv(self.arena, self.kv, 1), self.table,
            self.tokens, 0.1, self.expected,
        )  # fmt: skip
        self.workspace = allocate_decode_workspace(
            batch, self.heads, self.kv, 4096, self.out.device, DecodeConfig(8, 1, 0, 16)
        )

    def run(self, config: DecodeConfig, layer: int) -> None:
        """Attention of one layer."""
        launch_decode(
            self.q, self.k, self.v, self.rotary, LayerKv(self.arena, self.kv, layer), self.table,
            self.tokens, 0.1, self.out, self.workspace, config,
        )  # fmt: skip

    def us(self, config: DecodeConfig) -> float:
        """Microseconds per layer; checked first."""
        self.out.fill_(torch.nan)
        self.run(config, 1)
        torch.testing.assert_close(self.out, self.expected, rtol=2e-2, atol=2e-2)
        return cases.graph_us([partial(self.run, config, n) for n in range(self.layers)])


def compile_one(grouped: bool, config: DecodeConfig, batches: tuple[int, ...]) -> str:
    """Launch once at each batch, so that the binaries are in the cache."""
    try:
        for batch in batches:
            bench = Bench("8b" if grouped else "7b", [40] * batch)
            bench.run(replace(config, blocks=gpu(0).sms, piece=256), 0)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__}: {str(error)[:150]}"
    return ""


def candidates(compiled: list[DecodeConfig]) -> Iterator[DecodeConfig]:
    """What is tried."""
    for config in compiled:
        for per_sm in (8, 12, 16):
            for piece in PIECES:
                yield replace(config, blocks=per_sm * gpu(0).sms, piece=piece)


def measure(model: str, batch: int, context: int, compiled: list[DecodeConfig]) -> None:
    """Print the best few, by the mean of both batches' times over their bytes' time."""
    benches = [Bench(model, equal_lengths(batch, context)), Bench(model, unlike_lengths(batch))]
    floors = [bench.bytes / 4.28e6 for bench in benches]
    found: list[tuple[float, float, float, DecodeConfig]] = []
    for config in candidates(compiled):
        equal, unlike = (bench.us(config) for bench in benches)
        score = statistics.mean((equal / floors[0], unlike / floors[1]))
        found.append((score, equal, unlike, config))
    found.sort(key=lambda f: f[0])
    print(f"\n{model} batch {batch}: floors {floors[0]:.1f} equal, {floors[1]:.1f} unlike")
    for _, equal, unlike, cut in [*found[:6], *sorted(found, key=lambda f: f[1])[:2]]:
        print(f"  {equal:6.2f} {unlike:6.2f} us  {astuple(cut)}", flush=True)


def main() -> None:
    """Compile, then measure each model and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="7b,8b")
    parser.add_argument("--batches", default="32,1,8")
    parser.add_argument("--context", type=int, default=592)
    args = parser.parse_args()
    torch.manual_seed(0)
    batches = tuple(int(batch) for batch in args.batches.split(","))
    models = args.models.split(",")
    work = [
        (model == "8b", config, batches) for model in models for config in configs(model == "8b")
    ]
    with ProcessPoolExecutor(_COMPILERS, mp_context=get_context("spawn")) as compilers:
        errors = list(compilers.map(compile_one, *zip(*work, strict=True)))
    print(len(work), "configurations compiled", *filter(None, errors), sep="\n")
    for model in models:
        tried = [
            config
            for (grouped, config, _), error in zip(work, errors, strict=True)
            if grouped == (model == "8b") and not error
        ]
        for batch in batches:
            measure(model, batch, args.context, tried)


if __name__ == "__main__":
    main()
