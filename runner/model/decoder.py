"""The decoder, one file for every family: what differs is data in the config and the weights."""

from dataclasses import dataclass

import torch

from granatum.kernels.adapters import AdapterTable, GroupAdapters
from granatum.kernels.attention.decode import allocate_decode_workspace, decode_attention
from granatum.kernels.attention.prefill import prefill_attention
from granatum.kernels.layer.norm import add_rms_norm, embed_rms_norm
from granatum.kernels.layer.rotary import Rotary
from granatum.kernels.layout import LayerKv, RowPlaces, Tiles, make_query_tiles
from granatum.kernels.linear.contract import Linear, allocate_workspace
from granatum.kernels.linear.linear import Workspace
from granatum.kernels.lora.ops import workspace_elements
from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M
from granatum.models.config import ModelConfig
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.adapted import AdaptedLinear, AdaptedRows
from granatum.runner.model.arena import Arena
from granatum.runner.model.inputs import FEW_ROWS, QUERY_TILE_ROWS, Step
from granatum.runner.model.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: its norms, its linears with their adapters, and where its KV lies."""

    input_norm: torch.Tensor
    qkv: AdaptedLinear
    rotary: Rotary
    kv: LayerKv
    o: AdaptedLinear
    post_norm: torch.Tensor
    gate_up: AdaptedLinear
    down: AdaptedLinear


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
        self._partials = self._allocate_partials(limits)
        tokens = limits.pages_for(limits.max_context) * limits.page_tokens
        self._pieces = allocate_decode_workspace(
            limits.max_batch, config.heads, arena.kv, tokens, self.device
        )
        first = weights.layers[0]
        linears = (first.qkv, first.o, first.gate_up, first.down, weights.head)
        sums = allocate_workspace(limits.prefill_tokens, linears, self.device)
        angles = _angles(config, limits.max_context, self.device)
        self._layers = tuple(
            self._layer(index, layer, angles, sums) for index, layer in enumerate(weights.layers)
        )
        self._head = weights.head.within(sums)
        # Of every step: its samples are read before the next step begins.
        self._logits = torch.empty(
            limits.max_batch, config.vocab, dtype=torch.float32, device=self.device
        )

    def _layer(
        self,
        index: int,
        weights: LayerWeights,
        angles: tuple[torch.Tensor, torch.Tensor],
        sums: Workspace,
    ) -> Layer:
        """A layer's weights with its part of the arena."""
        config, pages = self.config, self._arena.pages
        names = [group.name for group in config.family.groups]

        def adapted(group: str, base: Linear) -> AdaptedLinear:
            widths = (config.in_features[group], config.out_features[group])
            adapters = GroupAdapters(pages, self._table, index, names.index(group), *widths)
            return AdaptedLinear(base.within(sums), adapters)

        return Layer(
            weights.input_norm,
            adapted("qkv", weights.qkv),
            Rotary(*angles, weights.q_norm, weights.k_norm, config.rms_eps),
            LayerKv(pages, self._arena.kv, index),
            adapted("o", weights.o),
            weights.post_norm,
            adapted("gate_up", weights.gate_up),
            adapted("down", weights.down),
        )

    def forward(self, step: Step, last: torch.Tensor, layers: int | None = None) -> torch.Tensor:
        """Logits [samples, vocab] of the step's sampling rows; KV of all its rows is written.

        The logits are float32, not rounded to the model's dtype, and hold until the next step.
        last int [seats]: the token that each seat's sequence drew last.
        `layers`: compute only the first ones; None: all.
        """
        weights, eps = self._weights, self.config.rms_eps
        rows = AdaptedRows.of(step, self._partials)
        residual = weights.embedding.new_empty(step.tokens.shape[0], weights.embedding.shape[1])
        x = torch.empty_like(residual)
        norm = weights.layers[0].input_norm
        scale = self.config.embedding_multiplier
        embed_rms_norm(step.tokens, last, weights.embedding, norm, eps, residual, x, scale=scale)
        scale = self.config.residual_multiplier
        for index, layer in enumerate(self._layers[:layers]):
            if index:
                add_rms_norm(x, residual, layer.input_norm, eps, scale=scale)
            x = layer.o.apply(self._attend(step, layer, x, rows), rows)
            add_rms_norm(x, residual, layer.post_norm, eps, scale=scale)
            x = layer.down.apply(layer.gate_up.activate(x, rows), rows)
        sampled = x.new_empty(step.sample_rows.shape[0], x.shape[1])
        add_rms_norm(x, residual, weights.norm, eps, sampled, step.sample_rows, scale=scale)
        logits = self._head.apply(sampled, self._logits[: sampled.shape[0]])
        if self.config.logits_scaling != 1.0:
            logits /= self.config.logits_scaling
        return logits

    def attend_far(self, rows: int, length: int) -> None:
        """Compute one layer's attention of a prompt's last `rows` tokens over `length` tokens.

        Only its time matters. For a CPU: there attention keeps nothing of what it computed.
        """
        config, arena, most = self.config, self._arena, min(rows, length)
        q = torch.zeros(most, config.heads * config.head_dim, dtype=arena.pages.dtype)
        pages = torch.zeros(1, -(-length // arena.kv.page_tokens), dtype=torch.int32)
        entries = make_query_tiles([(0, 0, most, length - most)], QUERY_TILE_ROWS)
        tiles = Tiles(torch.tensor(entries), torch.tensor([len(entries)]), QUERY_TILE_ROWS)
        kv, out = LayerKv(arena.pages, arena.kv, 0), torch.empty_like(q)
        prefill_attention(q, kv, pages, tiles, config.attention_scale, out)

    def _attend(self, step: Step, layer: Layer, x: torch.Tensor, rows: AdaptedRows) -> torch.Tensor:
        """Attention's output [rows, heads * head_dim] before the output projection."""
        config, n = self.config, step.shape.decodes
        qkv = layer.qkv.apply_short(x, rows)
        q, k, v = torch.split(qkv, list(config.out_features["qkv"]), dim=1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        scale = config.attention_scale
        if n:
            decode_attention(
                q[:n], k[:n], v[:n], layer.rotary, layer.kv, step.page_table[:n], step.lengths,
                scale, out[:n], self._pieces,
            )  # fmt: skip
        # Chunks come after decode attention, which sets `out` to 0 up to row `decodes`; chunks'
        # rows may be among those.
        if step.shape.query_tiles:
            places = RowPlaces(step.positions, step.kv_slots)
            layer.qkv.rotate_long(qkv, x, layer.rotary, layer.kv, places, rows)
            prefill_attention(q, layer.kv, step.page_table, step.query_tiles, scale, out)
        return out

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


def _angles(
    config: ModelConfig, positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, head_dim / 2] of every position, in float32."""
    frequencies = torch.tensor(config.rope.frequencies(config.head_dim), dtype=torch.float64)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    amplitude = config.rope.scaling.amplitude
    cos, sin = amplitude * angles.cos(), amplitude * angles.sin()
    return cos.float().to(device), sin.float().to(device)
