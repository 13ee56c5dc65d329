"""The arena: one tensor of equal pages for KV and adapters (docs/architecture.md)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from granatum.adapters_store.limits import padded_rank
from granatum.kernels.adapters import AdapterTable, GroupLayout
from granatum.kernels.layout import KvLayout
from granatum.models.base_model import BaseModel
from granatum.models.config import ModelConfig
from granatum.runner.model.dtypes import Dtypes
from granatum.v1.errors import InvalidRequest

MIN_PAGE_TOKENS = 16
MIN_HOST_BYTES = 64 << 20
"""The least host memory for adapters."""
HOST_ADAPTERS = 4
"""On a CPU, host memory for adapters has room for this many of the largest rank.

Rounding to whole pages may cost one.
"""


@dataclass(frozen=True, slots=True)
class Arena:
    """`pages` [pages, page_elements] in the model's dtype; `kv` says how KV lies in a page."""

    pages: torch.Tensor
    kv: KvLayout

    @property
    def total(self) -> int:
        """Pages there are."""
        return self.pages.shape[0]


def page_tokens(config: ModelConfig, max_rank: int) -> int:
    """Tokens per page: the least power of two for which a page holds an adapter's largest piece."""
    rank, inputs, outputs = padded_rank(max_rank), config.in_features, config.out_features
    pieces = [rank * max(outputs[group]) for group in outputs]
    pieces += [rank * len(outputs[group]) * inputs[group] for group in outputs]
    tokens = MIN_PAGE_TOKENS
    while tokens * config.kv_elements < max(pieces):
        tokens *= 2
    return tokens


def cpu_host_cache_bytes(model: Path, max_rank: int) -> int:
    """Host memory on a CPU: room for the largest adapter that may be uploaded, and some more."""
    try:
        base = BaseModel.from_config(model)
    except InvalidRequest:
        return MIN_HOST_BYTES  # the engine will refuse the model, and say why
    widths = sum(inputs + outputs for inputs, outputs in base.features.values())
    element_bytes = Dtypes.on(torch.device("cpu")).adapters.itemsize
    largest = padded_rank(max_rank) * widths * base.num_layers * element_bytes
    return max(MIN_HOST_BYTES, HOST_ADAPTERS * largest)


def allocate_arena(
    config: ModelConfig, tokens: int, pages: int, dtype: torch.dtype, device: torch.device
) -> Arena:
    """An arena of `pages` pages of `tokens` tokens each."""
    elements = tokens * config.kv_elements
    layout = KvLayout(elements, tokens, config.kv_heads, config.head_dim)
    return Arena(torch.zeros(pages, elements, dtype=dtype, device=device), layout)


def allocate_table(
    config: ModelConfig, slots: int, device: torch.device, max_rank: int
) -> AdapterTable:
    """A table of `slots` adapters for the model's groups; `max_rank` as they lie in the arena."""
    groups = GroupLayout(tuple(len(widths) for widths in config.out_features.values()))
    return AdapterTable.allocate(groups, slots, config.layers, device, max_rank)


def pages_that_fit(page_bytes: int, device: torch.device, share: float) -> int:
    """Pages that fit a GPU's memory beside the weights, which are there already.

    `share` of the memory is used in all. The rest is for activations and graphs.
    """
    free, total = torch.cuda.mem_get_info(device)
    return max((int(total * share) - (total - free)) // page_bytes, 0)
