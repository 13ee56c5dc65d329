"""Paged attention against float64 over the sequences' own keys and values."""

from itertools import product

import pytest
import torch

from granatum.kernels.attention import decode as attention
from granatum.kernels.attention.prefill import prefill_attention
from granatum.kernels.backend import INTERPRETING, runs_kernel
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, Tiles, make_query_tiles

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
        self.tokens = [torch.randn(2, kv_heads, length, head_dim).to(dtype) for length in lengths]
        for sequence, own in enumerate(pages):
            self.page_table[sequence, : len(own)] = own
        self.arena = torch.empty(sum(counts) + 2, elements, dtype=dtype, device=device)
        self.page_table = self.page_table.to(device)
        self.arena.copy_(self.laid_out())

    @property
    def layer(self) -> LayerKv:
        """As ops take it."""
        return LayerKv(self.arena, self.kv, LAYER)

    def laid_out(self) -> torch.Tensor:
        """The arena as it shall be."""
        arena = torch.full(self.arena.shape, torch.nan, dtype=self.arena.dtype)
        kv = self.kv
        for own, tokens in zip(self.page_table.tolist(), self.tokens, strict=True):
            for plane, head, t in product(range(2), range(kv.kv_heads), range(tokens.shape[2])):
                place = (LAYER * 2 + plane) * kv.kv_heads + head
                start = (place * kv.page_tokens + t % kv.page_tokens) * kv.head_dim
                page = own[t // kv.page_tokens]
                arena[page, start : start + kv.head_dim] = tokens[plane, head, t]
        return arena

    def forget_last(self) -> None:
        """Each sequence's last token is yet to be written."""
        for tokens in self.tokens:
            tokens[:, :, -1:] = torch.nan
        self.arena.copy_(self.laid_out())

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


class Batch:
    """A row for each of a cache's sequences, its query, key and value not rotated yet."""

    def __init__(self, cache: Cache, heads: int, *, norms: bool = False) -> None:
        self.cache, d = cache, cache.kv.head_dim
        rows, width, kv_width = len(cache.tokens), heads * d, cache.kv.kv_heads * d
        self.qkv = torch.randn(rows, width + 2 * kv_width + 16).to(cache.arena)
        self.q, self.k, self.v, _ = torch.split(self.qkv, [width, kv_width, kv_width, 16], dim=1)
        longest = max(tokens.shape[2] for tokens in cache.tokens)
        angles = torch.outer(torch.arange(longest + 1.0), 1e4 ** -torch.linspace(0, 1, d // 2))
        self.angles = angles.double()
        weights = torch.randn(2, d).to(cache.arena) if norms else (None, None)
        cos, sin = (part.to(cache.arena.device) for part in (angles.cos(), angles.sin()))
        self.rotary = Rotary(cos, sin, *weights)

    def truth(self, lengths: list[int], scale: float) -> torch.Tensor:
        """What `decode` shall give, and in the cache's tokens what it shall write."""
        rows = []
        for row, length in enumerate(lengths):
            q, k, v = (part[row].double().cpu() for part in (self.q, self.k, self.v))
            if length:
                own = self.cache.tokens[row][:, :, length - 1]
                own[0] = self._turn(k, length - 1, self.rotary.k_norm)
                own[1] = v.view(own[1].shape)
            turned = self._turn(q, length - 1, self.rotary.q_norm).to(self.q.dtype)
            rows.append(self.cache.truth(turned.flatten(), row, length, scale))
        return torch.stack(rows)

    def _turn(self, x: torch.Tensor, position: int, weight: torch.Tensor | None) -> torch.Tensor:
        """A row's heads [heads, head_dim] as complex numbers, turned by the position's angles."""
        x = x.view(-1, self.cache.kv.head_dim)
        if weight is not None:
            x = x / (x.square().mean(1, keepdim=True) + self.rotary.eps).sqrt()
            x = x * weight.double().cpu()
        low, high = x.chunk(2, dim=1)
        angle = self.angles[position]
        turned = torch.complex(low, high) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=1)


def workspace_of(batch: Batch) -> attention.DecodeWorkspace:
    cache, q = batch.cache, batch.q
    heads, tokens = (
        q.shape[1] // cache.kv.head_dim,
        cache.page_table.shape[1] * cache.kv.page_tokens,
    )
    workspace = attention.allocate_decode_workspace(q.shape[0], heads, cache.kv, tokens, q.device)
    workspace.partials.fill_(torch.nan)
    return workspace


def decode(batch: Batch, lengths: list[int], scale: float) -> torch.Tensor:
    cache, q = batch.cache, batch.q
    out = torch.full_like(q, torch.nan)
    before, workspace = batch.qkv.clone(), workspace_of(batch)
    attention.decode_attention(
        q,
        batch.k,
        batch.v,
        batch.rotary,
        cache.layer,
        cache.page_table,
        torch.tensor(lengths, dtype=torch.int32, device=q.device),
        scale,
        out,
        workspace,
    )
    assert torch.equal(batch.qkv.nan_to_num(), before.nan_to_num())
    assert not workspace.arrivals.any()
    assert not workspace.turns.any()
    return out


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens", "lengths"),
    [
        (4, 4, 32, 16, [1, 16, 17, 0, 70]),
        (4, 2, 48, 32, [5, 0, 100]),
        (8, 1, 64, 256, [700, 3]),
        (2, 2, 32, 16, [1100]),
        (2, 2, 128, 16, [1, 16, 17, 0, 33, 700]),
        (8, 2, 128, 16, [1, 16, 17, 0, 33, 700]),
        (8, 1, 128, 32, [1300, 3, 0, 90]),
    ],
)
def test_decode(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_tokens: int,
    lengths: list[int],
    norms: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    cache = Cache(lengths, kv_heads, head_dim, page_tokens, dtype, device)
    cache.forget_last()
    batch = Batch(cache, heads, norms=norms)
    scale = 2 * head_dim**-0.5
    out = decode(batch, lengths, scale)
    tolerance = TOLERANCE[dtype]
    expected = batch.truth(lengths, scale)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    expected = cache.laid_out()
    torch.testing.assert_close(
        cache.arena.cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (8, 64), (8, 128)])
def test_few_blocks_take_many_pieces_by_turn(
    heads: int, head_dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = attention.DecodeConfig(16, 2, blocks=3, piece=32)
    monkeypatch.setattr(attention, "decode_config", lambda *_: few)
    lengths = [70, 300, 0, 5, 1]
    cache = Cache(lengths, 2, head_dim, 16, torch.bfloat16, device)
    cache.forget_last()
    batch = Batch(cache, heads)
    out = decode(batch, lengths, 0.2)
    expected = batch.truth(lengths, 0.2)
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [32, 128])
def test_a_decoded_row_is_bit_identical_in_any_company(head_dim: int, device: torch.device) -> None:
    if not runs_kernel(torch.empty(0, device=device)):
        pytest.skip("a promise of the kernels")
    lengths = [70, 300, 5]
    batch = Batch(Cache(lengths, 1, head_dim, 16, torch.bfloat16, device), 2)
    crowd = decode(batch, lengths, 0.2)
    for row in range(3):
        alone = decode(batch, [n if i == row else 0 for i, n in enumerate(lengths)], 0.2)
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
    prefill_attention(q, cache.layer, cache.page_table, tiles, scale, out)
    expected = torch.full_like(q, 3.0, dtype=torch.float64, device="cpu")
    for sequence, first, rows, position in chunks:
        for m in range(rows):
            expected[first + m] = cache.truth(q[first + m], sequence, position + m + 1, scale)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 48), (8, 2, 128), (2, 2, 128)])
def test_sequences_that_are_not_finite_stay_alone(
    heads: int, kv_heads: int, head_dim: int, device: torch.device
) -> None:
    """Their pages, queries, keys and values; the others' bits are as without them."""
    lengths = [20, 40, 17, 18]
    chunks = [(0, 0, 5, 15), (1, 5, 17, 23), (2, 22, 17, 0), (3, 39, 3, 15)]
    tiles = Tiles.allocate(9, 16, device)
    tiles.fill(make_query_tiles(chunks, 16))
    found = []
    for broken in (False, True):
        torch.manual_seed(3)
        cache = Cache(lengths, kv_heads, head_dim, 16, torch.bfloat16, device)
        batch = Batch(cache, heads)
        q = torch.randn(42, heads * head_dim).to(cache.arena)
        if broken:
            cache.tokens[1][:], cache.tokens[3][:] = torch.nan, 1e30
            cache.arena.copy_(cache.laid_out())
            batch.qkv[1], q[5:22] = torch.nan, torch.nan
            batch.qkv[3], q[39:] = 1e30, 1e30
        prompts = torch.zeros_like(q)
        prefill_attention(q, cache.layer, cache.page_table, tiles, 0.2, prompts)
        found.append((decode(batch, lengths, 0.2)[::2], prompts[:5], prompts[22:39]))
    for innocent, beside in zip(*found, strict=True):
        assert torch.equal(innocent, beside)


def test_query_tiles_cut_chunks() -> None:
    assert make_query_tiles([(2, 5, 7, 100), (0, 12, 2, 0)], 4) == [
        (2, 5, 4, 100),
        (2, 9, 3, 104),
        (0, 12, 2, 0),
    ]


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_pieces_fit_their_tiles_and_are_not_too_many(rows: int, kv_heads: int) -> None:
    kv = KvLayout(1, 16, kv_heads, 128)
    config = attention.decode_config(32, kv, sms=132)
    tokens = attention.piece_tokens(config, rows, kv)
    assert tokens % config.block_t == 0
    assert tokens <= max(config.piece, 2 * config.block_t)
    for context in (16, 4096, 131072):
        assert 1 <= attention.most_pieces(config, rows, kv, context) <= attention.MAX_PIECES


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_graph_replays_other_lengths(head_dim: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    batch = Batch(Cache([600, 600, 600], 2, head_dim, 16, torch.bfloat16, device), 4)
    cache = batch.cache
    out = torch.empty_like(batch.q)
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    workspace = workspace_of(batch)

    def run() -> None:
        attention.decode_attention(
            batch.q, batch.k, batch.v, batch.rotary, cache.layer, cache.page_table, lengths, 0.2,
            out, workspace,
        )  # fmt: skip

    run()
    batch.truth([1, 1, 1], 0.2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for new in ([600, 1, 0], [0, 0, 0], [17, 511, 256]):
        lengths.copy_(torch.tensor(new))
        out.fill_(torch.nan)
        graph.replay()
        expected = batch.truth(new, 0.2)
        torch.testing.assert_close(out.double().cpu(), expected, rtol=8e-3, atol=8e-3)
