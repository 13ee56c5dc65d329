"""What settings make of what they are told, and what the README tells of them."""

import re
from pathlib import Path

import pytest

from granatum.router.settings import RouterSettings

README = Path(__file__).resolve().parents[2] / "README.md"
UNITS = {"": 1, " MiB": 1 << 20, " GiB": 1 << 30, " TiB": 1 << 40, ": no bound": 1}


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
    settings = RouterSettings(store="file:///nowhere", **places, **bounds)  # type: ignore[arg-type]
    assert settings.terms.max_queued_per_tenant == part


def test_the_readme_tells_every_limit_and_its_default() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([\d,]+)([^|]*) \|", README.read_text(), re.MULTILINE)
    told = {
        name.replace("-", "_"): int(number.replace(",", "")) * UNITS[unit]
        for name, number, unit in rows
    }
    defaults = {name: field.default for name, field in RouterSettings.model_fields.items()}
    assert told == {name: defaults[name] for name in told}
    assert told.keys() >= {name for name in defaults if name.startswith("max_")}
