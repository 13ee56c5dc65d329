"""How much a tenant may upload."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one adapter, and of one tenant's adapters."""

    max_bytes: int = 2 << 30
    """Of adapter_model.safetensors."""
    max_config_bytes: int = 1 << 20
    """Of adapter_config.json."""
    max_header_bytes: int = 8 << 20
    """Of the safetensors header."""
    max_rank: int = 256
    max_versions: int = 10_000
    """Of all of one tenant's adapters together."""


DEFAULT_LIMITS = Limits()
