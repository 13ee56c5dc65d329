"""Tiles in registers and rings as the tensor cores want them, for expands of long tiles.

Four warps multiply a tile of 64 rows with two times 64 columns of B, transposed: sums
[column, row]. The columns' order is free: row 8 e + g of the sums holds column 8 g + e. With this
order, B, y and the result lie in the registers that the instruction uses, and memory is read and
written 16 adjacent bytes at a time. y and B come through a ring in shared memory, copied a step
ahead.
"""

from granatum.kernels.gluon import async_load, gl, jit, mma_v2


@jit()
def to_sums(tile, SUMS: gl.constexpr):
    """A tile [row, column] as sums [8 e + g, row], in float32."""
    turned = gl.permute(gl.reshape(tile.to(gl.float32), [64, 8, 8]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 64]), SUMS, assert_trivial=True)


@jit()
def to_rows(sums, ROWS: gl.constexpr):
    """Sums [8 e + g, row] as a tile [row, column]."""
    turned = gl.permute(gl.reshape(sums, [8, 8, 64]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 64]), ROWS, assert_trivial=True)


@jit()
def make_rings(y, STAGES: gl.constexpr):
    """Room in shared memory for pairs of tiles of y, and of B."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    dtype: gl.constexpr = y.dtype.element_ty
    return (
        gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], LAYOUT),
        gl.allocate_shared_memory(dtype, [2 * STAGES, 16, 64], LAYOUT),
    )


@jit()
def copy_y(ring, stage, at, gap, present):
    """Begin to copy a pair of tiles of y, `gap` elements apart."""
    async_load(ring.index(2 * stage), at, mask=present)
    async_load(ring.index(2 * stage + 1), at + gap, mask=present)


@jit()
def copy_b(
    ring, stage, start, next_start, column, width, done, rank, next_rank, COPIED: gl.constexpr
):
    """Begin to copy a step's pair of B: ranks done to done + 15 of 64 columns, from both starts."""
    r = done + gl.arange(0, 16, gl.SliceLayout(1, COPIED))
    n = column + gl.arange(0, 64, gl.SliceLayout(0, COPIED))
    at = r[:, None] * width + n[None, :]
    async_load(ring.index(2 * stage), start + at, mask=(r < rank)[:, None])
    async_load(ring.index(2 * stage + 1), next_start + at, mask=(r < next_rank)[:, None])


@jit()
def read_b(tile, RANKS: gl.constexpr, SUMS: gl.constexpr):
    """A tile of B as the left operand [8 e + g, rank]."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    turned = gl.permute(gl.reshape(tile.load(RANKS), [16, 8, 8]), [2, 1, 0])
    return gl.convert_layout(gl.reshape(turned, [64, 16]), LEFT, assert_trivial=True)


@jit()
def make_held(PROJECTIONS: gl.constexpr, HELD: gl.constexpr):
    """Room in shared memory for the intermediate of a tile's rows, by projection and ranks."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    return gl.allocate_shared_memory(gl.bfloat16, [2 * PROJECTIONS * HELD, 16, 64], LAYOUT)


@jit()
def read_intermediate(held, place, SUMS: gl.constexpr):
    """The two bfloat16 that `hold_intermediate` keeps at a place."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    return held.index(2 * place).load(RIGHT), held.index(2 * place + 1).load(RIGHT)


@jit()
def add_product(sums, b, high, low):
    """sums + b @ (high + low)."""
    return mma_v2(b, low, mma_v2(b, high, sums))
