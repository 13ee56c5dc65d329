"""Finds how decode attention is best cut into blocks on this GPU, by measuring it.

    python benchmarks/attention_tune.py [--batches 32,1,8] [--context 592]

Times decode attention over scattered pages, in a CUDA graph over enough layers that the L2 cache
does not serve them, for heads with keys of their own (7B) and grouped ones (8B); each
configuration is checked against float32 first. `kernels/attention.py` names the best.
"""

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from multiprocessing import get_context

import lora_ops_cases as cases
import torch
from workload import SHAPES

from granatum.kernels.attention import DecodeConfig, launch_decode
from granatum.kernels.layout import KvLayout
from granatum.kernels.reference_attention import decode_attention

PAGE_TOKENS = 16
POOL_BYTES = 300e6
SPLITS = (1, 2, 4, 8, 16, 32)
_COMPILERS = 14


def configs(grouped: bool) -> Iterator[DecodeConfig]:
    """All that are tried; `blocks` and `splits` play no part."""
    for block_t, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8)):
        for stages in (3, 6):
            yield DecodeConfig(True, block_t, warps, stages, 0, 0)
    if not grouped:
        for block_t, warps in ((16, 1), (32, 1), (32, 2), (64, 4)):
            for stages in (1, 2, 3):
                yield DecodeConfig(False, block_t, warps, stages, 0, 0)


@dataclass
class Bench:
    """A batch of sequences of one length, their pages scattered over an arena of some layers."""

    model: str
    batch: int
    context: int

    def __post_init__(self) -> None:
        """Make the arena."""
        shape = SHAPES[self.model]
        self.kv_heads, self.heads, d = shape.kv_heads, shape.heads, shape.head_dim
        self.bytes = self.batch * self.context * 4 * self.kv_heads * d
        self.layers = max(2, math.ceil(POOL_BYTES / self.bytes))
        each = -(-self.context // PAGE_TOKENS)
        elements = self.layers * 2 * self.kv_heads * PAGE_TOKENS * d
        self.kv = KvLayout(elements, PAGE_TOKENS, self.kv_heads, d)
        pages = self.batch * each
        self.arena = torch.randn(pages, elements, dtype=torch.bfloat16, device="cuda")
        order = torch.randperm(pages, device="cuda").int().view(self.batch, each)
        table = torch.zeros(self.batch, 4096 // PAGE_TOKENS, dtype=torch.int32, device="cuda")
        table[:, :each] = order
        self.table = table
        self.lengths = torch.full((self.batch,), self.context, dtype=torch.int32, device="cuda")
        wide = torch.randn(self.batch, 3 * self.heads * d, dtype=torch.bfloat16, device="cuda")
        self.q = wide[:, : self.heads * d]
        self.out = torch.empty(self.batch, self.heads * d, dtype=torch.bfloat16, device="cuda")
        self.expected = torch.empty_like(self.out)
        decode_attention(
            self.q, self.arena, self.kv, 1, self.table, self.lengths, 0.1, self.expected
        )
        self.workspace = torch.empty(32 * self.batch * self.heads * (d + 2), device="cuda")

    def run(self, config: DecodeConfig, splits: int, layer: int) -> None:
        """Attention of one layer."""
        launch_decode(
            self.q, self.arena, self.kv, layer, self.table, self.lengths, 0.1, self.out,
            self.workspace, splits, config,
        )  # fmt: skip

    def us(self, config: DecodeConfig, splits: int) -> float:
        """Microseconds per layer; checked first."""
        self.out.fill_(torch.nan)
        self.run(config, splits, 1)
        torch.testing.assert_close(self.out, self.expected, rtol=2e-2, atol=2e-2)
        return cases.graph_us([partial(self.run, config, splits, n) for n in range(self.layers)])


def compile_one(grouped: bool, config: DecodeConfig) -> str:
    """Launch once with all splits, so that the binaries are in the cache."""
    try:
        bench = Bench("8b" if grouped else "7b", 1, 300)
        for splits in SPLITS:
            bench.run(config, splits, 0)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__}: {str(error)[:150]}"
    return ""


def measure(bench: Bench, tried: list[DecodeConfig]) -> None:
    """Print the best few."""
    found = []
    for config in tried:
        for splits in SPLITS:
            blocks = bench.batch * bench.kv_heads * splits
            if blocks >= 128 and blocks <= 4096 and splits * 16 <= bench.context:
                found.append((bench.us(config, splits), splits, astuple(config)[:4]))
    found.sort()
    floor = bench.bytes / 4.28e6
    print(f"\n{bench.model} batch {bench.batch} context {bench.context}: floor {floor:.1f} us")
    for us, splits, cut in found[:8]:
        print(f"  {us:6.2f} us  splits {splits:<2} {cut}")
    single = min((f for f in found if not f[2][0]), default=None)
    print("  best without tensor cores", single, flush=True)


def main() -> None:
    """Compile, then measure each model and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="32,1,8")
    parser.add_argument("--context", type=int, default=592)
    args = parser.parse_args()
    torch.manual_seed(0)
    work = [(grouped, config) for grouped in (False, True) for config in configs(grouped)]
    with ProcessPoolExecutor(_COMPILERS, mp_context=get_context("spawn")) as compilers:
        errors = dict(zip(work, compilers.map(compile_one, *zip(*work, strict=True)), strict=True))
    print(len(work), "configurations compiled", *filter(None, errors.values()), sep="\n")
    for model in ("7b", "8b"):
        tried = [c for grouped, c in work if grouped == (model == "8b") and not errors[grouped, c]]
        for batch in args.batches.split(","):
            measure(Bench(model, int(batch), args.context), tried)


if __name__ == "__main__":
    main()
