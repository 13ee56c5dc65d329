"""Launches of every kernel at a model's shapes, for `machine_code.py`."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from fake_gpu import on_gpu

from granatum.kernels.adapters import AdapterTable, GroupAdapters, GroupLayout, LoraRows
from granatum.kernels.attention.decode import allocate_decode_workspace, decode_attention
from granatum.kernels.attention.prefill import prefill_attention
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.norm import add_rms_norm, embed_rms_norm
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, RowPlaces, Tiles
from granatum.kernels.linear.dense import Dense
from granatum.kernels.linear.linear import Workspace
from granatum.kernels.lora import ops as lora
from granatum.kernels.sampling.greedy import greedy, greedy_workspace_elements
from granatum.kernels.sampling.penalties import count_tokens, penalize
from granatum.kernels.sampling.sample import sample

Launch = Callable[[], object]
GPU = torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LINEARS = {
    "7b": {
        0: (4096, (4096, 4096, 4096)),
        1: (4096, (4096,)),
        2: (4096, (11008, 11008)),
        3: (11008, (4096,)),
    },
    "8b": {
        0: (4096, (4096, 1024, 1024)),
        1: (4096, (4096,)),
        2: (4096, (14336, 14336)),
        3: (14336, (4096,)),
    },
    "odd": {0: (896, (896, 128, 128)), 1: (896, (896,)), 2: (896, (4864, 4864)), 3: (4864, (896,))},
}
"""By model and group: input features, and output features of each projection."""
LAYOUT = GroupLayout((3, 1, 2, 1))
LAYERS, LAYER = 32, 1
DECODES, PROMPTS = 16, 2048


def cases() -> Iterator[tuple[str, Launch]]:
    """Names, and what launches each kernel."""
    yield from lora_cases()
    yield from layer_cases()
    yield from attention_cases()
    yield from sampling_cases()
    yield from linear_cases()


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor that says it is on the GPU."""
    return on_gpu(torch.empty(shape, dtype=dtype))


def integers(*shape: int) -> torch.Tensor:
    """Zeros likewise."""
    return on_gpu(torch.zeros(shape, dtype=torch.int32))


def tiles_of(rows: int, block_m: int, *, ordered: bool = False) -> Tiles:
    """A list with room for a batch of `rows` rows."""
    capacity = rows if block_m == lora.DECODE_BLOCK_M else rows // block_m + 8
    order = integers(rows) if ordered else None
    return Tiles(integers(capacity, 4), integers(1), block_m, order)


class Group:
    """The arguments of the ops of one fused linear."""

    def __init__(
        self, model: str, group: int, rank: int, block_m: int, dtype: torch.dtype, **options: bool
    ) -> None:
        self.count = DECODES if block_m == lora.DECODE_BLOCK_M else PROMPTS
        k, outs = LINEARS[model][group]
        table = AdapterTable.allocate(LAYOUT, 64, LAYERS, "cpu", rank)
        a, b, ranks, scale = map(on_gpu, (table.a, table.b, table.rank, table.scale))
        table = AdapterTable(a, b, ranks, scale, LAYOUT, rank)
        arena = empty(1 << 20, dtype=dtype)
        self.adapters = GroupAdapters(arena, table, LAYER, group, k, outs)
        elements = lora.workspace_elements(self.count, k, outs, block_m, rank, GPU)
        workspace = empty(elements, dtype=FP32)
        self.rows = LoraRows(tiles_of(self.count, block_m, **options), workspace)
        self.x, self.y = (empty(self.count, n, dtype=dtype) for n in (k, sum(outs)))

    def add(self, *, beside_linear: bool = False) -> None:
        """`add_lora`."""
        lora.add_lora(self.y, self.x, self.adapters, self.rows, beside_linear=beside_linear)

    def make(self, bias: torch.Tensor | None) -> None:
        """`expand_from`."""
        lora.expand_from(bias, self.y, self.adapters, self.rows)

    def activate(self) -> None:
        """`silu_mul_with_lora`."""
        out = self.y.new_empty(self.count, self.adapters.out_features[0])
        lora.silu_mul_with_lora(self.y, self.x, out, self.adapters, self.rows)

    def rotate(self, norm: torch.Tensor | None) -> None:
        """`rope_with_lora`."""
        layout, numbers = kv_layout(self.adapters.out_features[1] // 128, 128), integers(self.count)
        kv, places = LayerKv(self.adapters.arena, layout, LAYER), RowPlaces(numbers, numbers)
        lora.rope_with_lora(self.y, self.x, rotary(128, norm), kv, places, self.adapters, self.rows)


def lora_cases() -> Iterator[tuple[str, Launch]]:
    """Shrinks and expands, alone and within the kernels that read what they make."""
    wanted = [("8b", rank, BF16) for rank in (16, 64, 256)]
    wanted += [("7b", 16, BF16), ("8b", 64, FP16), ("8b", 16, FP32), ("odd", 8, BF16)]
    for (model, rank, dtype), block_m in product(wanted, (2, 64)):
        name = f"{model} rank {rank} {dtype} by {block_m}"
        for group in range(4):
            made = Group(model, group, rank, block_m, dtype)
            yield f"add_lora {name} group {group}", made.add
        activation = Group(model, 2, rank, block_m, dtype)
        if dtype != FP32:
            yield f"silu_mul_with_lora {name}", activation.activate
        if block_m == 64:
            for group, biased in ((1, True), (3, False)):
                made = Group(model, group, rank, block_m, dtype)
                bias = empty(made.y.shape[1], dtype=dtype) if biased else None
                yield f"expand_from {name} group {group}", partial(made.make, bias)
            if model != "odd":
                for norm in (None, empty(128, dtype=dtype)):
                    made = Group(model, 0, rank, block_m, dtype)
                    yield (
                        f"rope_with_lora {name} normed {norm is not None}",
                        partial(made.rotate, norm),
                    )
    for block_m, group in product((2, 64), (0, 3)):
        made = Group("8b", group, 16, block_m, BF16, ordered=True)
        yield f"add_lora 8b rank 16 ordered by {block_m} group {group}", made.add
    for dtype, group in product((BF16, FP16), (0, 1)):
        made = Group("8b", group, 16, 2, dtype)
        yield (
            f"add_lora 8b {dtype} beside a linear, group {group}",
            partial(made.add, beside_linear=True),
        )


def kv_layout(kv_heads: int, head_dim: int, page_tokens: int = 16) -> KvLayout:
    """Pages of a model of LAYERS layers."""
    elements = LAYERS * 2 * kv_heads * page_tokens * head_dim
    return KvLayout(elements, page_tokens, kv_heads, head_dim)


def rotary(head_dim: int, norm: torch.Tensor | None) -> Rotary:
    """Angles, and norms of queries and keys."""
    angles = empty(4096, head_dim // 2, dtype=FP32)
    return Rotary(angles, angles, norm, norm, 1e-5)


def layer_cases() -> Iterator[tuple[str, Launch]]:
    """Norms, activation, positions."""
    for hidden, dtype in ((4096, BF16), (3584, BF16), (896, BF16), (4096, FP16), (4096, FP32)):
        x, row = empty(DECODES, hidden, dtype=dtype), empty(hidden, dtype=dtype)
        some, name = integers(8), f"{hidden} {dtype}"
        yield f"add_rms_norm {name}", partial(add_rms_norm, x, x, row, 1e-5)
        out = empty(8, hidden, dtype=dtype)
        yield f"add_rms_norm of rows {name}", partial(add_rms_norm, x, x, row, 1e-5, out, some)
        embedding, tokens = empty(32000, hidden, dtype=dtype), integers(DECODES)
        yield (
            f"embed_rms_norm {name}",
            partial(embed_rms_norm, tokens, tokens, embedding, row, 1e-5, x, x),
        )
    for n, dtype in ((11008, BF16), (14336, BF16), (14336, FP16), (4864, FP32)):
        gate_up, out = empty(DECODES, 2 * n, dtype=dtype), empty(DECODES, n, dtype=dtype)
        yield f"silu_mul {n} {dtype}", partial(silu_mul, gate_up, out)
    heads_of = [(32, 32, 128), (32, 8, 128), (28, 4, 128), (14, 2, 64), (32, 32, 96)]
    for (heads, kv_heads, d), dtype in product(heads_of, (BF16, FP16)):
        for normed in (False, True):
            qkv = empty(PROMPTS, (heads + 2 * kv_heads) * d, dtype=dtype)
            q, k, v = torch.split(qkv, [heads * d, kv_heads * d, kv_heads * d], dim=1)
            norm = empty(d, dtype=dtype) if normed else None
            numbers, arena = integers(PROMPTS), empty(1 << 20, dtype=dtype)
            kv = kv_layout(kv_heads, d)
            yield (
                f"rope_and_write_kv {heads}/{kv_heads}x{d} {dtype} normed {normed}",
                partial(
                    rope_and_write_kv,
                    q,
                    k,
                    v,
                    rotary(d, norm),
                    LayerKv(arena, kv, LAYER),
                    RowPlaces(numbers, numbers),
                ),
            )


def attention_cases() -> Iterator[tuple[str, Launch]]:
    """Decode steps of few and many rows, and prompts."""
    heads_of = [(32, 32, 128, 16), (32, 8, 128, 16), (32, 8, 128, 64), (28, 4, 128, 16)]
    heads_of += [(32, 2, 128, 16), (14, 2, 64, 32), (32, 32, 96, 16)]
    for (heads, kv_heads, d, page_tokens), dtype in product(heads_of, (BF16, FP16, FP32)):
        kv, name = kv_layout(kv_heads, d, page_tokens), f"{heads}/{kv_heads}x{d} {dtype}"
        name, arena = f"{name} pages of {page_tokens}", empty(1 << 20, dtype=dtype)
        for rows, normed in ((1, False), (8, True), (64, False), (256, False)):
            qkv = empty(rows, (heads + 2 * kv_heads) * d, dtype=dtype)
            q, k, v = torch.split(qkv, [heads * d, kv_heads * d, kv_heads * d], dim=1)
            pages, out = integers(rows, 4096 // page_tokens), empty(rows, heads * d, dtype=dtype)
            norm = empty(d, dtype=dtype) if normed else None
            workspace = allocate_decode_workspace(rows, heads, kv, 4096, torch.device("cpu"))
            yield f"decode_attention {name} of {rows} normed {normed}", partial(
                decode_attention, q, k, v, rotary(d, norm), LayerKv(arena, kv, LAYER), pages,
                integers(rows), 0.1, out, workspace,
            )  # fmt: skip
        q = empty(PROMPTS, (heads + 2 * kv_heads) * d, dtype=dtype)[:, : heads * d]
        out, pages = empty(PROMPTS, heads * d, dtype=dtype), integers(64, 4096 // page_tokens)
        yield (
            f"prefill_attention {name}",
            partial(
                prefill_attention,
                q,
                LayerKv(arena, kv, LAYER),
                pages,
                tiles_of(PROMPTS, 64),
                0.1,
                out,
            ),
        )


def sampling_cases() -> Iterator[tuple[str, Launch]]:
    """The choice of the next token."""
    for vocabulary in (32000, 128256):
        logits = empty(DECODES, vocabulary, dtype=FP32)
        row, seats, name = empty(DECODES, dtype=FP32), integers(DECODES), f"{vocabulary} {FP32}"
        elements = greedy_workspace_elements(DECODES, vocabulary)
        workspace = on_gpu(torch.empty(elements, dtype=torch.int64))
        yield (
            f"greedy {name}",
            partial(greedy, logits, seats, workspace, seats, seats, seats),
        )
        yield (
            f"sample {name}",
            partial(sample, logits, row, seats, row, row, row, seats, seats),
        )
        counts = integers(64, vocabulary)
        yield f"penalize {name}", partial(penalize, logits, counts, seats, row, row, row)
        yield f"count_tokens {name}", partial(count_tokens, counts, seats, seats)


def linear_cases() -> Iterator[tuple[str, Launch]]:
    """Every linear of the models that a kernel of ours serves, and the output projections."""
    workspace = Workspace(empty(1 << 24, dtype=FP32), integers(1 << 14))
    shapes = {(k, sum(outs)) for model in LINEARS.values() for k, outs in model.values()}
    for (k, n), rows in product(sorted(shapes), (8, 32, 64)):
        for bias in (None, empty(n)):
            made = Dense(empty(n, k), bias, workspace)
            if made.may_overlap(rows):
                name = f"linear {k}->{n} of {rows} biased {bias is not None}"
                yield name, partial(made.apply, empty(rows, k))
    for n, rows in product((32000, 128256), (8, 32, 64)):
        made, logits = Dense(empty(n, 4096), None, workspace), empty(rows, n, dtype=FP32)
        yield f"logits 4096->{n} of {rows}", partial(made.apply, empty(rows, 4096), logits)
