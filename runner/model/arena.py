"""The arena: one tensor of equal pages for KV and adapters (docs/architecture.md)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from granatum.adapters_store.limits import RANK_STEP
from granatum.kernels.adapters import AdapterTable, GroupLayout
from granatum.kernels.layout import KvLayout
from granatum.models.base_model import BaseModel
from granatum.models.config import GROUPS, ModelConfig
from granatum.runner.adapters.images.layout import padded
from granatum.v1.errors import InvalidRequest

MIN_PAGE_TOKENS = 16
MIN_HOST_BYTES = 64 << 20
"""Host memory for adapters, where the largest of them need no more."""
HOST_ADAPTERS = 4
"""Of the largest rank, for which a CPU's engine has host memory; pages waste less than one."""
_CPU_BYTES = 4
"""Of an element: on a CPU models compute in float32."""


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
    """Tokens per page: the least power of two whose page holds an adapter's largest piece."""
    rank = padded(max_rank, RANK_STEP)
    pieces = [rank * max(config.out_features[group]) for group in GROUPS]
    pieces += [rank * len(config.out_features[g]) * config.in_features[g] for g in GROUPS]
    tokens = MIN_PAGE_TOKENS
    while tokens * config.kv_elements < max(pieces):
        tokens *= 2
    return tokens


def host_bytes(model: Path, max_rank: int) -> int:
    """Host memory for adapters on a CPU: whatever may be uploaded must fit, and some beside it."""
    try:
        base = BaseModel.from_config(model)
    except InvalidRequest:
        return MIN_HOST_BYTES  # the engine cannot start with such a model, and will say why
    widths = sum(inputs + outputs for inputs, outputs in base.features.values())
    largest = padded(max_rank, RANK_STEP) * widths * base.num_layers * _CPU_BYTES
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
    """Pages with which a GPU's memory, the weights already in it, is used up to `share`.

    The rest is for activations and graphs.
    """
    free, total = torch.cuda.mem_get_info(device)
    return max((int(total * share) - (total - free)) // page_bytes, 0)
