"""How far the kernels' bfloat16 results are from float64, beside what rounding alone costs.

    python benchmarks/accuracy.py --out benchmarks/results/h200/accuracy.json

On a 7B layer's shapes with random inputs: |out - truth| / |truth| (Euclidean) of every op, and of
the truth itself once rounded to bfloat16, the least that a bfloat16 output can have.
"""

import argparse
import math
from collections.abc import Iterator

import lora_ops_cases as cases
import torch
from lora_harness import tile_batch
from results import Results, add_options

from granatum.kernels.adapters import GroupAdapters, LoraRows
from granatum.kernels.attention.decode import allocate_decode_workspace, decode_attention
from granatum.kernels.attention.prefill import prefill_attention
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.norm import add_rms_norm
from granatum.kernels.layer.rope import rope_and_write_kv
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import KvLayout, LayerKv, RowPlaces, Tiles, make_query_tiles
from granatum.kernels.lora import ops as lora

HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 32, 128, 4096, 11008
PAGE_TOKENS = 16
EPS = 1e-5

Outcome = tuple[str, torch.Tensor, torch.Tensor]
"""An op's name, its result and the truth in float64."""


def lora_outcomes() -> Iterator[Outcome]:
    """What each group's adapters add: y itself is left at zero, so that nothing hides the error."""
    batches = (
        cases.decode(32, "distinct"),
        cases.decode(32, "skewed"),
        cases.prefill(512, "distinct"),
    )
    for rank in (16, 64):
        for group in cases.GROUPS:
            linear = cases.Linear("7b", group, rank)
            for batch in batches:
                yield f"lora {group} rank {rank}, {batch.name}", *_lora(linear, batch)


def _lora(linear: cases.Linear, batch: cases.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    matrices = cases.make_matrices(linear, batch.distinct)
    packed = cases.pack_matrices(matrices)
    x, y = cases.activations(linear, batch)
    y.zero_()
    block_m = lora.DECODE_BLOCK_M if batch.rows <= 128 else lora.PREFILL_BLOCK_M
    tiles = tile_batch(batch.adapters, block_m, x.device)
    table = packed.table(linear.group_index, batch.distinct, 1)
    widths = (linear.in_features, linear.out_features)
    elements = lora.workspace_elements(batch.rows, *widths, block_m, table.max_rank, x.device)
    workspace = torch.full((elements,), math.nan, device=x.device)
    adapters = GroupAdapters(packed.arena, table, 0, linear.group_index, *widths)
    lora.add_lora(y, x, adapters, LoraRows(tiles, workspace))
    truth = torch.zeros(y.shape, dtype=torch.float64, device=x.device)
    for row, adapter in enumerate(batch.adapters):
        parts = [
            (x[row].double() @ a[adapter].double().T) @ b[adapter].double().T
            for a, b in zip(matrices.a, matrices.b, strict=True)
        ]
        truth[row] = cases.SCALE * torch.cat(parts)
    return y, truth


def attention_outcomes() -> Iterator[Outcome]:
    """Decodes over 600 tokens, and a chunk of 256 rows after 300 tokens, for MHA and GQA."""
    tokens, rows = 600, 4
    angles = torch.zeros(tokens, HEAD_DIM // 2, device="cuda")
    still = Rotary(angles.cos(), angles.sin())
    for kv_heads in (HEADS, 8):
        kv = KvLayout(2 * kv_heads * PAGE_TOKENS * HEAD_DIM, PAGE_TOKENS, kv_heads, HEAD_DIM)
        per_row = -(-tokens // PAGE_TOKENS)
        shape = (rows * per_row, 2, kv_heads, PAGE_TOKENS, HEAD_DIM)
        pages = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        layer_kv = LayerKv(pages.view(rows * per_row, -1), kv, 0)
        table = torch.arange(rows * per_row, dtype=torch.int32, device="cuda").view(rows, per_row)
        keys, values = (
            pages[:, plane].view(rows, per_row, kv_heads, PAGE_TOKENS, HEAD_DIM).transpose(1, 2)
            .reshape(rows, kv_heads, per_row * PAGE_TOKENS, HEAD_DIM).double()
            .repeat_interleave(HEADS // kv_heads, dim=1)
            for plane in range(2)
        )  # fmt: skip
        q = _random(rows, HEADS * HEAD_DIM)
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device="cuda")
        workspace = allocate_decode_workspace(
            rows, HEADS, kv, per_row * PAGE_TOKENS, torch.device("cuda")
        )
        workspace.partials.fill_(math.nan)
        out = torch.full_like(q, math.nan)
        scale = HEAD_DIM**-0.5
        own = [pages[table[:, -1].long(), plane, :, (tokens - 1) % PAGE_TOKENS] for plane in (0, 1)]
        k, v = (part.reshape(rows, -1) for part in own)
        decode_attention(q, k, v, still, layer_kv, table, lengths, scale, out, workspace)
        heads = q.double().view(rows, HEADS, 1, HEAD_DIM)
        truth = _attend(heads, keys[:, :, :tokens], values[:, :, :tokens], scale, 0)
        yield f"decode attention, {kv_heads} KV heads", out, truth.reshape(rows, -1)

        out, truth = _chunk_attended(layer_kv, table, keys[1], values[1], scale)
        yield f"prefill attention, {kv_heads} KV heads", out, truth


def _chunk_attended(
    kv: LayerKv, table: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk's attention over the sequence of the table's row 1, and what it should be."""
    chunk, first = 256, 300
    q = _random(chunk, HEADS * HEAD_DIM)
    out = torch.full_like(q, math.nan)
    tiles = Tiles.allocate(chunk // 64, 64, "cuda")
    tiles.fill(make_query_tiles([(1, 0, chunk, first)], 64))
    prefill_attention(q, kv, table, tiles, scale, out)
    heads = q.double().view(chunk, HEADS, HEAD_DIM).transpose(0, 1)
    end = first + chunk
    truth = _attend(heads, keys[:, :end], values[:, :end], scale, first)
    return out, truth.transpose(0, 1).reshape(chunk, -1)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, first: int
) -> torch.Tensor:
    """Softmax attention in float64; with several queries, causal from position `first` on."""
    scores = q @ keys.transpose(-1, -2) * scale
    if q.shape[-2] > 1:
        at = torch.arange(keys.shape[-2], device=q.device)
        own = first + torch.arange(q.shape[-2], device=q.device)
        scores = scores.masked_fill(at[None, :] > own[:, None], -math.inf)
    return torch.softmax(scores, dim=-1) @ values


def layer_outcomes() -> Iterator[Outcome]:
    """Norm with residual, rotary positions, gated activation."""
    x, residual, weight = _random(32, HIDDEN), _random(32, HIDDEN), _random(HIDDEN)
    summed = (x.float() + residual.float()).to(torch.bfloat16).double()
    truth = summed * torch.rsqrt(summed.square().mean(1, keepdim=True) + EPS) * weight.double()
    add_rms_norm(x, residual, weight, EPS)
    yield "add_rms_norm", x, truth

    gate_up = _random(32, 2 * INTERMEDIATE)
    out = torch.full((32, INTERMEDIATE), math.nan, dtype=torch.bfloat16, device="cuda")
    silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=1)
    yield "silu_mul", out, gate * torch.sigmoid(gate) * up
    yield "rope", *_rope()


def _rope() -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 1e4 ** -(
        torch.arange(0, HEAD_DIM, 2, dtype=torch.float64, device="cuda") / HEAD_DIM
    )
    positions = torch.randint(0, 4096, (32,), dtype=torch.int32, device="cuda")
    angles = torch.outer(torch.arange(4096, dtype=torch.float64, device="cuda"), frequencies)
    q, k, v = (_random(32, HEADS * HEAD_DIM) for _ in range(3))
    first, second = q.double().view(32, HEADS, 2, -1).unbind(2)
    cos, sin = (f(angles[positions.long()])[:, None] for f in (torch.cos, torch.sin))
    truth = torch.stack((first * cos - second * sin, second * cos + first * sin), 2)
    kv = KvLayout(2 * HEADS * PAGE_TOKENS * HEAD_DIM, PAGE_TOKENS, HEADS, HEAD_DIM)
    arena = torch.zeros(2, kv.page_elements, dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(32, dtype=torch.int32, device="cuda")
    rotary = Rotary(angles.cos().float(), angles.sin().float())
    rope_and_write_kv(q, k, v, rotary, LayerKv(arena, kv, 0), RowPlaces(positions, slots))
    return q, truth.reshape(32, -1)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def relative(result: torch.Tensor, truth: torch.Tensor) -> float:
    """|result - truth| / |truth|; not a number if an element was not written."""
    error = (result.double() - truth).norm() / truth.norm()
    return float(error)


def main() -> None:
    """Measure every op, refusing what is far from its rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    results = Results(parser.parse_args(), key=("op",))
    torch.manual_seed(0)
    for outcomes in (lora_outcomes(), attention_outcomes(), layer_outcomes()):
        for op, result, truth in outcomes:
            rounding = relative(truth.to(result.dtype), truth)
            error = relative(result, truth)
            results.add({"op": op, "error": error, "rounding": rounding})
            assert error < 2 * rounding, f"{op}: {error} is more than twice its rounding {rounding}"
    results.print_table(("error", "rounding"))


if __name__ == "__main__":
    main()
