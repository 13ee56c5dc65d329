"""A router's public services as a small double on a real port."""

from collections.abc import AsyncIterator

import pytest
from doubles import Service, serve


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """It listens on `service.address`; what it was asked is in its lists."""
    async with serve() as running:
        yield running
