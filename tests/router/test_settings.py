"""What settings make of what they are told."""

from pathlib import Path

import pytest

from granatum.router.settings import Settings


@pytest.mark.parametrize(
    ("bounds", "part"),
    [
        ({}, 512),
        ({"max_queue": 100}, 50),
        ({"max_queue": 3}, 16),
        ({"max_queue": 4000, "max_queued_per_tenant": 3000}, 2000),
        ({"max_queued_per_tenant": 7}, 7),
    ],
)
def test_one_tenant_gets_at_most_half_of_a_long_queue(
    bounds: dict[str, int], part: int, tmp_path: Path
) -> None:
    places = {"model-config": tmp_path, "cluster-key": "secret", "keys": tmp_path}
    settings = Settings(store="file:///nowhere", **places, **bounds)  # type: ignore[arg-type]
    assert settings.tenants_queue == part
