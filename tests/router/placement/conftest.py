"""Registries of one fleet on one server, with other terms."""

from collections.abc import AsyncIterator

import pytest
from placements import TERMS, terms

from granatum.router.placement.registry import Registry


@pytest.fixture
async def brief(redis_url: str, fleet: str) -> AsyncIterator[Registry]:
    """The same fleet with leases that lapse at once."""
    async with Registry(redis_url, fleet, terms(lease_s=0.05, runner_lease_s=0.05)) as registry:
        yield registry


@pytest.fixture
async def long(redis_url: str, fleet: str) -> AsyncIterator[Registry]:
    """The same fleet with a queue for a thousand."""
    async with Registry(redis_url, fleet, TERMS) as registry:
        yield registry
