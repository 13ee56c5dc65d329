"""How much a tenant may upload."""

from dataclasses import dataclass

RANK_STEP = 8
"""In memory, ranks are multiples of this, so that every row of A and Bᵀ is 16-byte aligned."""


def padded_rank(rank: int) -> int:
    """The rows that a matrix of this rank takes in memory."""
    return -(-rank // RANK_STEP) * RANK_STEP


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Bounds of one adapter, and of one tenant's adapters."""

    max_bytes: int = 2 << 30
    """Of adapter_model.safetensors."""
    max_config_bytes: int = 1 << 20
    """Of adapter_config.json."""
    max_header_bytes: int = 2 << 20
    """Of the safetensors header. It is parsed in one go, and everything else waits meanwhile."""
    max_rank: int = 256
    max_versions: int = 10_000
    """Of all of one tenant's adapters together."""
    max_tenant_bytes: int = 1 << 40
    """Of all of one tenant's adapters together, equal bytes counted once."""
    max_aliases: int = 1_000
    """Of one tenant."""


DEFAULT_LIMITS = UploadLimits()


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """The largest adapter that a runner serves. 0 means: the runner did not say."""

    max_rank: int = 0
    max_elements: int = 0

    def has_rank(self, rank: int) -> bool:
        """Whether an adapter of this rank is served."""
        return not self.max_rank or rank <= self.max_rank

    def has_elements(self, elements: int) -> bool:
        """Whether an adapter of this many elements fits."""
        return not self.max_elements or elements <= self.max_elements


FleetLimits = tuple[RunnerLimits, ...]
"""The limits of the fleet's runners; empty if no runner is known."""
