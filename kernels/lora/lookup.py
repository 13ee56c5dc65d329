"""What a block of a LoRA kernel looks up first: its tile, its rows, its projection and columns.

These helpers are in Triton; `gluon.of_triton` translates them for kernels in Gluon.
"""

from granatum.kernels.backend import jit, tl


@jit()
def source_rows(order, row, present):
    """The rows of x and y that stand at `row` in the tiles' order; where not `present`, some valid
    row."""
    if order is not None:
        row = tl.load(order + row, mask=present, other=0)
    return row.to(tl.int64)


@jit()
def load_tile(entries, count, tile):
    """The tile's slot, first row and rows. A spare tile has slot 0, which exists, and no rows."""
    used = tile < tl.load(count)
    slot = tl.load(entries + tile * 4)
    first = tl.load(entries + tile * 4 + 1)
    rows = tl.load(entries + tile * 4 + 2)
    return tl.where(used, slot, 0).to(tl.int64), first, tl.where(used, rows, 0)


@jit()
def load_adapter_tile(entries, count, tile):
    """As `load_tile`, but a tile without an adapter is spare as well."""
    slot, first, rows = load_tile(entries, count, tile)
    return tl.maximum(slot, 0), first, tl.where(slot < 0, 0, rows)


@jit()
def find_slice(block, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_N: tl.constexpr):
    """A group's columns are cut into blocks, projection by projection. For the n-th block: its
    projection, its first column in it, the projection's width, and where the projection begins."""
    blocks0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    second = block >= blocks0
    third = block >= blocks0 + blocks1
    p = second.to(tl.int32) + third.to(tl.int32)
    block -= tl.where(third, blocks0 + blocks1, tl.where(second, blocks0, 0))
    width = tl.where(third, N2, tl.where(second, N1, N0))
    start = tl.where(third, N0 + N1, tl.where(second, N0, 0))
    return p, block * BLOCK_N, width, start


@jit()
def rank_before(ranks, p, PROJECTIONS: tl.constexpr):
    """The projection's rank, and its first row in the group's stacked A."""
    rank = tl.load(ranks)
    column = 0 * rank
    for q in tl.static_range(1, PROJECTIONS):
        own = tl.load(ranks + q)
        column += tl.where(p >= q, tl.load(ranks + q - 1), 0)
        rank = tl.where(p == q, own, rank)
    return rank, column


@jit()
def stacked_a(
    arena, a_offsets, ranks, place, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr, LAYER_PROJECTIONS: tl.constexpr,
):  # fmt: skip
    """Where the group's stacked A begins, and its rows; `place` is slot * layers + layer."""
    start = arena + tl.multiple_of(tl.load(a_offsets + place * GROUPS + GROUP), 32)
    rows = tl.load(ranks + place * LAYER_PROJECTIONS + PROJECTION)
    for p in tl.static_range(1, PROJECTIONS):
        rows += tl.load(ranks + place * LAYER_PROJECTIONS + PROJECTION + p)
    return start, rows


@jit()
def load_inside(at, inside, FULL: tl.constexpr):
    """Weights where they are inside, else 0; FULL: all are."""
    return tl.load(at) if FULL else tl.load(at, mask=inside, other=0.0)
