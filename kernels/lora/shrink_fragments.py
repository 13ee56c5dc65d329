"""A decode step's shrink on the tensor cores; neither operand is ever in shared memory.

One warp multiplies 16 ranks with up to eight rows at once. An instruction costs the same for one
row as for eight, and a row's sums are the same in any company. A dot product may be summed in any
order, so each lane loads eight adjacent features of A and of x, and the instruction takes the
operands from where they were loaded.

The kernel takes bfloat16 alone. For other dtypes, and under the interpreter, `shrink` multiplies
row by row.
"""

import torch

from granatum.kernels.gluon import (
    AVAILABLE,
    gl,
    jit,
    launch_dependents,
    mma_v2,
    of_triton,
    wait,
)
from granatum.kernels.lora import lookup


def serves(x: torch.Tensor) -> bool:
    """Whether the kernel takes x's dtype."""
    return AVAILABLE and x.dtype == torch.bfloat16


_load_adapter_tile = of_triton(lookup.load_adapter_tile)
_source_rows = of_triton(lookup.source_rows)
_stacked_a = of_triton(lookup.stacked_a)


@jit("rows_total", "width", "layers", "layer")
def shrink_kernel(
    x, arena, a_offsets, ranks, entries, count, order, partials,
    x_stride, rows_total, width, layers, layer,
    GROUP: gl.constexpr, GROUPS: gl.constexpr,
    PROJECTION: gl.constexpr, PROJECTIONS: gl.constexpr, LAYER_PROJECTIONS: gl.constexpr,
    K: gl.constexpr, CHUNK_K: gl.constexpr, RANK_BLOCKS: gl.constexpr,
    BESIDE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One block: a chunk of K, a tile, every RANK_BLOCKS-th block of 16 stacked ranks.

    The two halves of the chunk are summed apart, so that neither waits for the other's products.
    BESIDE: as in `shrink._shrink_rows_kernel`.
    """
    HALF: gl.constexpr = CHUNK_K // 2
    EVEN: gl.constexpr = K % CHUNK_K == 0
    CACHE: gl.constexpr = ".cg" if BESIDE else ""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    chunk = gl.program_id(0)
    tile = gl.program_id(1)
    rank_block = gl.program_id(2)
    slot, first, rows = _load_adapter_tile(entries, count, tile)
    a_start, stacked = _stacked_a(
        arena, a_offsets, ranks, slot * layers + layer, GROUP, GROUPS, PROJECTION, PROJECTIONS,
        LAYER_PROJECTIONS,
    )  # fmt: skip
    begin = rank_block * 16
    if (rows > 0) & (begin < stacked):
        r = gl.arange(0, 16, gl.SliceLayout(1, LEFT))[:, None]
        k = chunk * CHUNK_K + gl.arange(0, HALF, gl.SliceLayout(0, LEFT))[None, :]
        x_k = chunk * CHUNK_K + gl.arange(0, HALF, gl.SliceLayout(1, RIGHT))[:, None]
        m = gl.arange(0, 8, gl.SliceLayout(0, RIGHT))
        out_r = gl.arange(0, 16, gl.SliceLayout(1, SUMS))[:, None]
        out_m = gl.arange(0, 8, gl.SliceLayout(0, SUMS))[None, :]
        source = _source_rows(order, first + m, m < rows)
        for start in range(begin, stacked, RANK_BLOCKS * 16):
            a_at = a_start + (start + r) * K + k
            real = start + r < stacked
            a0 = gl.load(a_at, mask=real & ((k < K) | EVEN), other=0.0)
            a1 = gl.load(a_at + HALF, mask=real & ((k + HALF < K) | EVEN), other=0.0)
            if PDL:
                launch_dependents()
                if not BESIDE:
                    wait()
            for done in range(0, rows, 8):
                if done > 0:
                    source = _source_rows(order, first + done + m, done + m < rows)
                x_at = x + source[None, :] * x_stride + x_k
                present = (done + m < rows)[None, :]
                inside = present & ((x_k < K) | EVEN)
                x0 = gl.load(x_at, mask=inside, other=0.0, cache_modifier=CACHE)
                inside = present & ((x_k + HALF < K) | EVEN)
                x1 = gl.load(x_at + HALF, mask=inside, other=0.0, cache_modifier=CACHE)
                zeros = gl.zeros([16, 8], gl.float32, SUMS)
                sums = mma_v2(a0, x0, zeros) + mma_v2(a1, x1, zeros)
                row = chunk * rows_total + first + done + out_m
                kept = (start + out_r < stacked) & (done + out_m < rows)
                gl.store(partials + row.to(gl.int64) * width + start + out_r, sums, mask=kept)
    if PDL and chunk + tile + rank_block == 0:
        wait()  # one block that waits keeps the next kernel from overtaking
