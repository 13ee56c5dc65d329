"""The keys that a router knows, while their file changes."""

import stat
import time
from pathlib import Path

import pytest

from granatum.router.services import keys
from granatum.router.services.keys import Keys
from granatum.router.services.keys_file import Identity, add, digest_of, read, revoke
from granatum.v1.errors import InvalidRequest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the file every time."""
    monkeypatch.setattr(keys, "_CHECK_S", 0.0)


def test_a_key_names_its_tenant_and_is_not_in_the_file(file: Path) -> None:
    acme = add(file, Identity("acme"))
    admin = add(file, Identity(None))
    known = Keys(file)
    assert known.identify(acme) == Identity("acme")
    assert known.identify(admin) == Identity(None)
    assert known.identify(acme + "x") is None
    assert known.identify("") is None
    text = file.read_text()
    assert acme not in text
    assert admin not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.usefixtures("impatient")
def test_changes_count_without_a_restart(file: Path) -> None:
    acme = add(file, Identity("acme"))
    known = Keys(file)
    globex = add(file, Identity("globex"))
    assert known.identify(globex) == Identity("globex")
    revoke(file, digest_of(acme)[:12])
    assert known.identify(acme) is None
    assert known.identify(globex) == Identity("globex")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", '{"keys": [{"sha256": "12", "tenant": "acme"}]}', '{"keys": 7}', None],
)
def test_a_broken_file_leaves_the_keys_as_they_were(file: Path, broken: str | None) -> None:
    acme = add(file, Identity("acme"))
    known = Keys(file)
    whole = file.read_text()
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    assert known.identify(acme) == Identity("acme")
    with pytest.raises(InvalidRequest, match="keys file"):
        Keys(file)
    file.write_text(whole)
    add(file, Identity("globex"))
    assert known.identify(acme) == Identity("acme")


def test_the_file_is_looked_at_once_a_second_at_most(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(file, Identity("acme"))
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    known = Keys(file)
    globex = add(file, Identity("globex"))
    assert known.identify(globex) is None
    now = 101.1
    assert known.identify(globex) == Identity("globex")


def test_a_key_bounds_the_priority_that_its_tenant_may_ask_for(file: Path) -> None:
    usual, high = add(file, Identity("acme")), add(file, Identity("acme", 7))
    known = Keys(file)
    assert [known.identify(key) for key in (usual, high)] == [
        Identity("acme", 0),
        Identity("acme", 7),
    ]
    for identity in (Identity("acme", 1001), Identity("acme", -1001), Identity(None, 7)):
        with pytest.raises(InvalidRequest, match="max_priority"):
            add(file, identity)
    assert len(read(file)) == 2
