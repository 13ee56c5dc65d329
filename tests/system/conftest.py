"""A cluster of real processes around the example model for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster

from granatum.examples.tasks import BASE_MODEL


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Valkey runs; routers and runners are the test's to start."""
    with Cluster(tmp_path, BASE_MODEL) as started:
        yield started
