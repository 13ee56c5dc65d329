"""The decoder, one page for every family: what differs is data in the config and the weights."""

import torch

from granatum.kernels.attention.decode import allocate_decode_workspace, decode_attention
from granatum.kernels.attention.prefill import prefill_attention
from granatum.kernels.layer.activation import silu_mul
from granatum.kernels.layer.norm import add_rms_norm, embed_rms_norm
from granatum.kernels.layer.rope import Rotary, rope_and_write_kv
from granatum.kernels.layout import AdapterTable, Tiles, make_query_tiles
from granatum.kernels.linear.linear import allocate_workspace, linear, runs_kernel_of_ours
from granatum.kernels.lora.ops import (
    add_lora,
    linear_with_lora,
    rope_with_lora,
    silu_mul_with_lora,
    workspace_elements,
)
from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M
from granatum.models.config import ModelConfig
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.arena import Arena
from granatum.runner.model.inputs import FEW_ROWS, QUERY_TILE_ROWS, Step
from granatum.runner.model.weights import Linear, Weights


class Model:
    """A base model on a device, with the arena of its KV and adapters.

    `limits` bound a step's decodes and its rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        arena: Arena,
        table: AdapterTable,
        limits: EngineLimits,
    ) -> None:
        self.config = config
        self.device = weights.device
        self._weights, self._arena, self._table = weights, arena, table
        self._cos, self._sin = _angles(config, weights.device)
        self._partials = self._allocate_partials(limits)
        tokens = limits.pages_for(limits.max_context) * limits.page_tokens
        self._pieces = allocate_decode_workspace(
            limits.max_batch, config.heads, arena.kv, tokens, self.device
        )
        first = weights.layers[0]
        linears = (first.qkv, first.o, first.gate_up, first.down)
        shapes = [*(part.weight for part in linears), weights.head]
        self._sums = allocate_workspace(limits.prefill_tokens, shapes)

    def forward(self, step: Step, last: torch.Tensor) -> torch.Tensor:
        """Logits [samples, vocab] of the step's sampling rows; KV of all its rows is written.

        last int [seats]: what sequences drew last, for tokens that only the device knows.
        """
        weights, eps = self._weights, self.config.rms_eps
        residual = weights.embedding.new_empty(step.tokens.shape[0], weights.embedding.shape[1])
        x = torch.empty_like(residual)
        norm = weights.layers[0].input_norm
        scale = self.config.embedding_multiplier
        embed_rms_norm(step.tokens, last, weights.embedding, norm, eps, residual, x, scale=scale)
        scale = self.config.residual_multiplier
        for index, layer in enumerate(weights.layers):
            if index:
                add_rms_norm(x, residual, layer.input_norm, eps, scale=scale)
            x = self._linear(step, index, "o", layer.o, self._attend(step, index, x))
            add_rms_norm(x, residual, layer.post_norm, eps, scale=scale)
            x = self._linear(step, index, "down", layer.down, self._activate(step, index, x))
        sampled = x.new_empty(step.sample_rows.shape[0], x.shape[1])
        add_rms_norm(x, residual, weights.norm, eps, sampled, step.sample_rows, scale=scale)
        logits = linear(sampled, weights.head, None, self._sums)
        if self.config.logits_scaling != 1.0:
            logits /= self.config.logits_scaling
        return logits

    def attend_far(self, rows: int, length: int) -> None:
        """One layer's attention of a prompt's last `rows` tokens over `length`, for its time alone.

        On a CPU, whose attention keeps nothing of it.
        """
        config, arena, most = self.config, self._arena, min(rows, length)
        q = torch.zeros(most, config.heads * config.head_dim, dtype=arena.pages.dtype)
        pages = torch.zeros(1, -(-length // arena.kv.page_tokens), dtype=torch.int32)
        entries = make_query_tiles([(0, 0, most, length - most)], QUERY_TILE_ROWS)
        tiles = Tiles(torch.tensor(entries), torch.tensor([len(entries)]), QUERY_TILE_ROWS)
        prefill_attention(
            q, arena.pages, arena.kv, 0, pages, tiles, config.attention_scale, torch.empty_like(q)
        )

    def _attend(self, step: Step, index: int, x: torch.Tensor) -> torch.Tensor:
        """Attention's output [rows, heads * head_dim] before the output projection."""
        layer, config, arena = self._weights.layers[index], self.config, self._arena
        qkv = linear(x, layer.qkv.weight, layer.qkv.bias, self._sums)
        self._add_short(step, index, "qkv", layer.qkv, qkv, x)
        q, k, v = torch.split(qkv, list(config.out_features["qkv"]), dim=1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        rotary = Rotary(self._cos, self._sin, layer.q_norm, layer.k_norm, config.rms_eps)
        place, scale = (arena.pages, arena.kv, index), config.attention_scale
        decodes = step.shape.decodes
        if decodes:
            decode_attention(
                q[:decodes], k[:decodes], v[:decodes], rotary, *place, step.page_table[:decodes],
                step.lengths, scale, out[:decodes], self._pieces,
            )  # fmt: skip
        if step.shape.query_tiles:  # after the decodes, which clear the rows beyond theirs
            if step.shape.long_tiles:
                rope_with_lora(
                    qkv, x, step.positions, rotary, arena.kv, step.kv_slots, arena.pages,
                    self._table, index, step.long_tiles, self._partials,
                )  # fmt: skip
            else:
                rope_and_write_kv(q, k, v, step.positions, rotary, *place, step.kv_slots)
            prefill_attention(q, *place, step.page_table, step.query_tiles, scale, out)
        return out

    def _activate(self, step: Step, index: int, x: torch.Tensor) -> torch.Tensor:
        """The activation's output [rows, intermediate] before the down projection."""
        base = self._weights.layers[index].gate_up
        gate_up = linear(x, base.weight, base.bias, self._sums)
        out = gate_up.new_empty(gate_up.shape[0], self.config.intermediate)
        place = (self._arena.pages, self._table, index)
        if step.shape.long_tiles:
            silu_mul_with_lora(gate_up, x, out, *place, step.long_tiles, self._partials)
        if n := step.shape.short_tiles:
            silu_mul_with_lora(
                gate_up[:n], x[:n], out[:n], *place, step.short_tiles, self._partials,
                beside_linear=_just_made(step, x, base),
            )  # fmt: skip
        if not step.shape.lora:
            silu_mul(gate_up, out)
        return out

    def _linear(
        self, step: Step, index: int, group: str, base: Linear, x: torch.Tensor
    ) -> torch.Tensor:
        """A fused linear [rows, out], with what each row's adapter adds."""
        if step.shape.long_tiles:
            place = self._place(index, group)
            y = linear_with_lora(x, base.weight, base.bias, *place, step.long_tiles, self._partials)
        else:
            y = linear(x, base.weight, base.bias, self._sums)
        self._add_short(step, index, group, base, y, x)
        return y

    def _add_short(
        self, step: Step, index: int, group: str, base: Linear, y: torch.Tensor, x: torch.Tensor
    ) -> None:
        """Add to y what the adapters of rows in short tiles make of x, right after the linear."""
        if n := step.shape.short_tiles:
            tiles, place = step.short_tiles, self._place(index, group)
            beside = _just_made(step, x, base)
            add_lora(y[:n], x[:n], *place, tiles, self._partials, beside_linear=beside)

    def _place(
        self, index: int, group: str
    ) -> tuple[torch.Tensor, AdapterTable, int, int, tuple[int, ...]]:
        """Where the adapters' parts of a fused linear are, and how wide it is."""
        outs = self.config.out_features[group]
        names = [known.name for known in self.config.family.groups]
        return self._arena.pages, self._table, index, names.index(group), outs

    def _allocate_partials(self, limits: EngineLimits) -> torch.Tensor:
        """Room for the LoRA kernels' partial sums in the largest step."""
        config, rank = self.config, self._table.max_rank
        few = max(limits.max_batch, FEW_ROWS)
        sizes = ((few, DECODE_BLOCK_M), (limits.prefill_tokens, PREFILL_BLOCK_M))
        elements = max(
            workspace_elements(
                rows, config.in_features[g], config.out_features[g], block_m, rank, self.device
            )
            for g in config.in_features
            for rows, block_m in sizes
        )
        return torch.empty(elements, dtype=torch.float32, device=self.device)


def _just_made(step: Step, x: torch.Tensor, base: Linear) -> bool:
    """Whether what comes before the LoRA of short tiles is our own linear of x."""
    return not step.shape.long_tiles and runs_kernel_of_ours(x, base.weight)


def _angles(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [max_positions, head_dim / 2] of every position, in float32."""
    frequencies = torch.tensor(config.rope.frequencies(config.head_dim), dtype=torch.float64)
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)
