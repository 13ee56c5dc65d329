"""Paged attention against float64 over the sequences' own keys and values."""

import math

import pytest
import torch

from granatum.kernels import attention
from granatum.kernels.backend import INTERPRETING, runs_kernel
from granatum.kernels.layout import KvLayout, Tiles, make_query_tiles

BFLOAT16 = 2e-2 if INTERPRETING else 8e-3  # the interpreter cuts off what rounding would keep
TOLERANCE = {torch.bfloat16: BFLOAT16, torch.float16: 2e-3, torch.float32: 1e-5}
LAYERS, LAYER = 2, 1


class Cache:
    """Sequences of random keys and values, in scattered pages of an arena of NaN."""

    def __init__(
        self,
        lengths: list[int],
        kv_heads: int,
        head_dim: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        elements = LAYERS * 2 * kv_heads * page_tokens * head_dim + 128
        self.kv = KvLayout(elements, page_tokens, kv_heads, head_dim)
        counts = [-(-length // page_tokens) for length in lengths]
        pages = torch.split(torch.randperm(sum(counts) + 2)[: sum(counts)], counts)
        width = max(*counts, 1) + 1
        self.page_table = torch.full((len(lengths), width), 1 << 30, dtype=torch.int32)
        arena = torch.full((sum(counts) + 2, elements), torch.nan, dtype=dtype)
        self.tokens = [torch.randn(2, kv_heads, length, head_dim).to(dtype) for length in lengths]
        for sequence, (own, tokens) in enumerate(zip(pages, self.tokens, strict=True)):
            self.page_table[sequence, : len(own)] = own
            for t in range(lengths[sequence]):
                for plane in range(2):
                    for head in range(kv_heads):
                        place = (LAYER * 2 + plane) * kv_heads + head
                        start = (place * page_tokens + t % page_tokens) * head_dim
                        page = int(own[t // page_tokens])
                        arena[page, start : start + head_dim] = tokens[plane, head, t]
        self.arena = arena.to(device)
        self.page_table = self.page_table.to(device)

    def truth(self, q: torch.Tensor, sequence: int, length: int, scale: float) -> torch.Tensor:
        """Attention of one row q [heads * head_dim] over the first `length` tokens."""
        if length == 0:
            return torch.zeros(q.shape[0], dtype=torch.float64)
        heads = q.double().cpu().view(-1, self.kv.head_dim)
        group = heads.shape[0] // self.kv.kv_heads
        rows = []
        for h, query in enumerate(heads):
            keys, values = self.tokens[sequence][:, h // group, :length].double()
            rows.append(torch.softmax(keys @ query * scale, dim=0) @ values)
        return torch.cat(rows)


def decode(cache: Cache, q: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    out = torch.full_like(q, torch.nan)
    table = cache.page_table
    elements = attention.decode_workspace_elements(
        q.shape[0], q.shape[1] // cache.kv.head_dim, cache.kv, table.shape[1] * cache.kv.page_tokens
    )
    attention.decode_attention(
        q,
        cache.arena,
        cache.kv,
        LAYER,
        table,
        torch.tensor(lengths, dtype=torch.int32, device=q.device),
        scale,
        out,
        torch.full((elements,), torch.nan, device=q.device),
    )
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens", "lengths"),
    [
        (4, 4, 32, 16, [1, 16, 17, 0, 70]),
        (4, 2, 48, 32, [5, 0, 100]),
        (8, 1, 64, 256, [700, 3]),
        (2, 2, 32, 16, [1100]),
    ],
)
def test_decode(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    cache = Cache(lengths, kv_heads, head_dim, page_tokens, dtype, device)
    scale = 2 * head_dim**-0.5
    wide = torch.randn(len(lengths), heads * head_dim + 16).to(cache.arena)
    q = wide[:, : heads * head_dim]
    out = decode(cache, q, lengths, scale)
    expected = torch.stack(
        [cache.truth(q[i], i, length, scale) for i, length in enumerate(lengths)]
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_a_decoded_row_is_bit_identical_in_any_company(device: torch.device) -> None:
    if not runs_kernel(torch.empty(0, device=device)):
        pytest.skip("a promise of the kernels")
    lengths = [70, 300, 5]
    cache = Cache(lengths, 1, 32, 16, torch.bfloat16, device)
    q = torch.randn(3, 64).to(cache.arena)
    crowd = decode(cache, q, lengths, 0.2)
    for row in range(3):
        alone = decode(cache, q, [n if i == row else 0 for i, n in enumerate(lengths)], 0.2)
        assert torch.equal(alone[row], crowd[row])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"), [(4, 2, 32, 16), (2, 2, 48, 64)]
)
def test_prefill(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    cache = Cache([40, 130, 1], kv_heads, head_dim, page_tokens, dtype, device)
    chunks = [(1, 0, 33, 97), (0, 33, 40, 0), (2, 75, 1, 0)]  # rows 73 and 74 belong to none
    scale = 2 * head_dim**-0.5
    q = torch.randn(76, heads * head_dim).to(cache.arena)
    out = torch.full_like(q, 3.0)
    tiles = Tiles.allocate(9, 16, device)
    tiles.entries.fill_(1 << 30)
    tiles.fill(make_query_tiles(chunks, 16))
    attention.prefill_attention(
        q, cache.arena, cache.kv, LAYER, cache.page_table, tiles, scale, out
    )
    expected = torch.full_like(q, 3.0, dtype=torch.float64, device="cpu")
    for sequence, first, rows, position in chunks:
        for m in range(rows):
            expected[first + m] = cache.truth(q[first + m], sequence, position + m + 1, scale)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_query_tiles_cut_chunks() -> None:
    assert make_query_tiles([(2, 5, 7, 100), (0, 12, 2, 0)], 4) == [
        (2, 5, 4, 100),
        (2, 9, 3, 104),
        (0, 12, 2, 0),
    ]


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_splits_are_powers_of_two_that_fit_the_context(rows: int) -> None:
    kv = KvLayout(1, 16, 8, 128)
    for tokens in (16, 4096, 131072):
        splits = attention.decode_splits(rows, 32, kv, tokens)
        assert splits == 2 ** round(math.log2(splits))
        assert splits == 1 or splits * 128 <= tokens


@pytest.mark.gpu
def test_graph_replays_other_lengths() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    cache = Cache([600, 600, 600], 2, 64, 16, torch.bfloat16, device)
    q = torch.randn(3, 256).to(cache.arena)
    out, lengths = torch.empty_like(q), torch.ones(3, dtype=torch.int32, device=device)
    tokens = cache.page_table.shape[1] * 16
    elements = attention.decode_workspace_elements(3, 4, cache.kv, tokens)
    workspace = torch.empty(elements, device=device)

    def run() -> None:
        attention.decode_attention(
            q, cache.arena, cache.kv, LAYER, cache.page_table, lengths, 0.2, out, workspace
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for new in ([600, 1, 0], [0, 0, 0], [17, 511, 256]):
        lengths.copy_(torch.tensor(new))
        out.fill_(torch.nan)
        graph.replay()
        expected = torch.stack([cache.truth(q[i], i, n, 0.2) for i, n in enumerate(new)])
        torch.testing.assert_close(out.double().cpu(), expected, rtol=8e-3, atol=8e-3)
