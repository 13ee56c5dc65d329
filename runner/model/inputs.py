"""What a step needs on the device, in one pinned buffer and one copy.

Sections, all of 4-byte elements; R rows, B sequences, P pages of a sequence, C tiles at most:

    tokens                     [R]
    positions, kv_slots        [R]   of chunks' rows; page * page_tokens + place of their KV, or -1
    lengths                    [B]   tokens of each decode row's sequence, its own included; 0: none
    seats, sample_rows         [B]   of the rows that make a token: sequence's seat, row
    short_tiles, long_tiles, query_tiles   [C, 4] [1]  with their counts
    ...                        [B]   sampling parameters
    page_table              [B, P]   last, so that a small batch copies little

A token of -1 - seat means: the last token of that seat, which the device alone knows.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from granatum.kernels.layout import Tiles, make_query_tiles, make_tiles
from granatum.kernels.lora.tuning import DECODE_BLOCK_M, PREFILL_BLOCK_M
from granatum.runner.engine.execution.draws import uniform
from granatum.runner.engine.scheduling.plan import EngineLimits, Plan, Span

QUERY_TILE_ROWS = 64
"""Rows of a prompt chunk that attend together."""
FEW_ROWS = 64
"""In a step of at most this many rows, all rows go through short tiles."""

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes that grids depend on; one CUDA graph serves every step of a shape."""

    rows: int
    decodes: int
    """Leading rows that attend one query each; those beyond the batch have length 0."""
    samples: int
    short_tiles: int
    """Capacity of short tiles: one for each decode row, or for each row if rows are few."""
    long_tiles: int
    """Capacity of long tiles, which cover all rows; decodes' rows are listed without an adapter."""
    query_tiles: int
    """0: a step of decodes alone."""

    @property
    def lora(self) -> bool:
        """Whether rows may have adapters."""
        return self.short_tiles + self.long_tiles > 0


def decode_shape(rows: int, *, lora: bool) -> StepShape:
    """A step of `rows` decodes; `lora`: whether some may have an adapter."""
    return StepShape(rows, rows, rows, rows if lora else 0, 0, 0)


def mixed_shape(rows: int, decodes: int, samples: int, sequences: int, *, lora: bool) -> StepShape:
    """A step of `rows` rows, prompt chunks among them, of up to `sequences` sequences."""
    decodes = min(rows, decodes)
    short, long = decodes, rows // PREFILL_BLOCK_M + sequences + 1
    if rows <= FEW_ROWS:
        short, long = rows, 0
    if not lora:
        short, long = 0, 0
    return StepShape(rows, decodes, samples, short, long, rows // QUERY_TILE_ROWS + sequences)


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Of each row that makes a token; what they mean is in records.Sampling."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    uniform: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The device's view of a step of one shape."""

    shape: StepShape
    tokens: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    seats: torch.Tensor
    sample_rows: torch.Tensor
    short_tiles: Tiles
    long_tiles: Tiles
    query_tiles: Tiles
    sampling: SamplingInputs


_ALIGNMENT = 32
"""Elements."""
_TILES = ("short_tiles", "long_tiles", "query_tiles")
"""In the order of their counts."""
_SAMPLING = ("temperature", "top_p", "min_p", "uniform", "repetition", "presence", "frequency")


def _sections(limits: EngineLimits) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of each section, the element at which it begins, 128-byte aligned, and its shape."""
    offset, sections = 0, {}
    for name, shape in _shapes(limits).items():
        sections[name] = (offset, shape)
        offset += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return sections


def _shapes(limits: EngineLimits) -> dict[str, tuple[int, ...]]:
    rows, batch = limits.prefill_tokens, limits.max_batch
    largest = mixed_shape(rows, batch, batch, batch, lora=True)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "positions", "kv_slots"), (rows,))
    shapes |= dict.fromkeys(("lengths", "seats", "sample_rows", "top_k", *_SAMPLING), (batch,))
    short = max(batch, min(rows, FEW_ROWS))
    capacities = (short, largest.long_tiles, largest.query_tiles)
    shapes |= {name: (capacity, 4) for name, capacity in zip(_TILES, capacities, strict=True)}
    shapes |= {"counts": (len(_TILES),)}
    return {**shapes, "page_table": (batch, limits.pages_for(limits.max_context))}


class HostInputs:
    """A pinned buffer as numpy arrays by section."""

    def __init__(self, limits: EngineLimits, pinned: bool) -> None:
        self.limits = limits
        sections = _sections(limits)
        self._head, table = sections["page_table"]
        self.buffer = torch.zeros(self._head + prod(table), dtype=torch.int32, pin_memory=pinned)
        self._arrays: dict[str, Ints] = {
            name: self.buffer[start : start + prod(shape)].numpy().reshape(shape)
            for name, (start, shape) in sections.items()
        }

    def fill(self, plan: Plan, shape: StepShape, *, sampling: bool) -> int:
        """Write `plan`, padded to `shape`; the buffer's elements that have to be copied.

        `sampling`: whether the sampling parameters are needed.
        """
        self._fill_rows(plan, shape)
        self._fill_sequences(plan, shape)
        self._fill_tiles(plan, shape)
        if sampling:
            self._fill_sampling(plan.sampling)
        width: int = self._arrays["page_table"].shape[1]
        return self._head + max(len(plan.spans), shape.decodes) * width

    def _fill_rows(self, plan: Plan, shape: StepShape) -> None:
        page_tokens = self.limits.page_tokens
        tokens: list[int] = []
        for span in plan.spans:
            sequence = span.sequence
            assert sequence.seat is not None
            end = span.start + span.rows
            tokens += [-1 - sequence.seat] if span.fed else sequence.tokens[span.start : end]
        positions = [0] * len(plan.decodes)
        kv_slots = [-1] * len(plan.decodes)
        for span in plan.chunks:
            sequence, end = span.sequence, span.start + span.rows
            positions += range(span.start, end)
            for position in range(span.start, end):
                page = sequence.pages[position // page_tokens]
                kv_slots.append(page * page_tokens + position % page_tokens)
        self._put("tokens", tokens, shape.rows, 0)
        self._put("positions", positions, shape.rows, 0)
        self._put("kv_slots", kv_slots, shape.rows, -1)

    def _fill_sequences(self, plan: Plan, shape: StepShape) -> None:
        self._put("lengths", [s.start + 1 for s in plan.decodes], shape.decodes, 0)
        ends = np.cumsum([s.rows for s in plan.spans])
        rows = [int(end) - 1 for end, s in zip(ends, plan.spans, strict=True) if s.samples]
        self._put("sample_rows", rows, shape.samples, 0)
        seats = [span.sequence.seat or 0 for span in plan.sampling]
        self._put("seats", seats, shape.samples, self.limits.max_batch)
        table = self._arrays["page_table"]
        for index, span in enumerate(plan.spans):
            table[index, : len(span.sequence.pages)] = span.sequence.pages

    def _fill_tiles(self, plan: Plan, shape: StepShape) -> None:
        slots: list[int | None] = []
        for span in plan.spans if shape.lora else ():
            slots += [span.sequence.slot] * span.rows
        short = len(plan.decodes) if shape.long_tiles else len(slots)
        tiles = make_tiles(slots[:short], DECODE_BLOCK_M, base=True)
        self._put_tiles("short_tiles", [(*tile, 0) for tile in tiles])
        if shape.long_tiles:
            slots[:short] = [None] * short
            tiles = make_tiles(slots, PREFILL_BLOCK_M, base=True)
            self._put_tiles("long_tiles", [(*tile, 0) for tile in tiles])
        if shape.query_tiles:
            chunks, first = [], len(plan.decodes)
            for index, span in enumerate(plan.chunks):
                chunks.append((len(plan.decodes) + index, first, span.rows, span.start))
                first += span.rows
            self._put_tiles("query_tiles", make_query_tiles(chunks, QUERY_TILE_ROWS))

    def _fill_sampling(self, spans: tuple[Span, ...]) -> None:
        all_params = [span.sequence.submit.sampling for span in spans]
        drawn = [uniform(p.seed, s.start + s.rows) for p, s in zip(all_params, spans, strict=True)]
        self._put("top_k", [p.top_k for p in all_params], len(spans), 0)
        columns: dict[str, list[float]] = {
            "temperature": [p.temperature for p in all_params],
            "top_p": [p.top_p for p in all_params],
            "min_p": [p.min_p for p in all_params],
            "uniform": drawn,
            "repetition": [p.repetition_penalty for p in all_params],
            "presence": [p.presence_penalty for p in all_params],
            "frequency": [p.frequency_penalty for p in all_params],
        }
        for name, values in columns.items():
            self._arrays[name].view(np.float32)[: len(values)] = values

    def _put(self, name: str, values: list[int], padded: int, padding: int) -> None:
        array = self._arrays[name]
        array[: len(values)] = values
        array[len(values) : padded] = padding

    def _put_tiles(self, name: str, tiles: list[tuple[int, int, int, int]]) -> None:
        if tiles:
            self._arrays[name][: len(tiles)] = tiles
        self._arrays["counts"][_TILES.index(name)] = len(tiles)


class DeviceInputs:
    """The buffer on the device, at a fixed address, and its views by shape."""

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        sections = _sections(limits)
        head, table = sections["page_table"]
        self._buffer = torch.zeros(head + prod(table), dtype=torch.int32, device=device)
        self._tensors: dict[str, torch.Tensor] = {}
        for name, (start, shape) in sections.items():
            part = self._buffer[start : start + prod(shape)].view(shape)
            self._tensors[name] = part.view(torch.float32) if name in _SAMPLING else part
        self._tensors["kv_slots"].fill_(-1)  # before the first fill, every row is padding

    def copy(self, host: HostInputs, elements: int) -> None:
        """Take over the first `elements` elements; asynchronous where the host's are pinned."""
        self._buffer[:elements].copy_(host.buffer[:elements], non_blocking=True)

    def view(self, shape: StepShape) -> Step:
        """The tensors of a step of `shape`."""
        part = self._tensors
        return Step(
            shape=shape,
            tokens=part["tokens"][: shape.rows],
            positions=part["positions"][: shape.rows],
            kv_slots=part["kv_slots"][: shape.rows],
            page_table=part["page_table"],
            lengths=part["lengths"][: shape.decodes],
            seats=part["seats"][: shape.samples],
            sample_rows=part["sample_rows"][: shape.samples],
            short_tiles=self._tiles("short_tiles", shape.short_tiles, DECODE_BLOCK_M),
            long_tiles=self._tiles("long_tiles", shape.long_tiles, PREFILL_BLOCK_M),
            query_tiles=self._tiles("query_tiles", shape.query_tiles, QUERY_TILE_ROWS),
            sampling=self.sampling(shape.samples),
        )

    def _tiles(self, name: str, capacity: int, block_m: int) -> Tiles:
        index = _TILES.index(name)
        count = self._tensors["counts"][index : index + 1]
        return Tiles(self._tensors[name][:capacity], count, block_m)

    def sampling(self, samples: int) -> SamplingInputs:
        """The sampling parameters of the first `samples` rows that make a token."""
        names = ("top_k", *_SAMPLING)
        return SamplingInputs(**{name: self._tensors[name][:samples] for name in names})
