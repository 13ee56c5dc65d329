"""The arena: one tensor of equal pages for KV and adapters (docs/architecture.md)."""

from dataclasses import dataclass

import torch

from granatum.kernels.layout import KvLayout
from granatum.runner.config import GROUPS, ModelConfig

MIN_PAGE_TOKENS = 16
_RANK_STEP = 8


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
    rank = -(-max_rank // _RANK_STEP) * _RANK_STEP
    pieces = [rank * max(config.out_features[group]) for group in GROUPS]
    pieces += [rank * len(config.out_features[g]) * config.in_features[g] for g in GROUPS]
    tokens = MIN_PAGE_TOKENS
    while tokens * config.kv_elements < max(pieces):
        tokens *= 2
    return tokens


def allocate_arena(
    config: ModelConfig, tokens: int, pages: int, dtype: torch.dtype, device: torch.device
) -> Arena:
    """An arena of `pages` pages of `tokens` tokens each."""
    elements = tokens * config.kv_elements
    layout = KvLayout(elements, tokens, config.kv_heads, config.head_dim)
    return Arena(torch.zeros(pages, elements, dtype=dtype, device=device), layout)


def pages_that_fit(page_bytes: int, device: torch.device, share: float) -> int:
    """Pages with which a GPU's memory, the weights already in it, is used up to `share`.

    The rest is for activations and graphs.
    """
    free, total = torch.cuda.mem_get_info(device)
    return max((int(total * share) - (total - free)) // page_bytes, 0)
