"""The keys file and its command."""

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from granatum.router.services import keys
from granatum.router.services.keys import Identity, Keys
from granatum.v1.errors import InvalidRequest, NotFound


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the file every time."""
    monkeypatch.setattr(keys, "_CHECK_S", 0.0)


def test_a_key_names_its_tenant_and_is_not_in_the_file(file: Path) -> None:
    acme = keys.add(file, Identity("acme"))
    admin = keys.add(file, Identity(None))
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
    acme = keys.add(file, Identity("acme"))
    known = Keys(file)
    globex = keys.add(file, Identity("globex"))
    assert known.identify(globex) == Identity("globex")
    keys.revoke(file, keys.digest_of(acme)[:12])
    assert known.identify(acme) is None
    assert known.identify(globex) == Identity("globex")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", '{"keys": [{"sha256": "12", "tenant": "acme"}]}', '{"keys": 7}', None],
)
def test_a_broken_file_leaves_the_keys_as_they_were(file: Path, broken: str | None) -> None:
    acme = keys.add(file, Identity("acme"))
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
    keys.add(file, Identity("globex"))
    assert known.identify(acme) == Identity("acme")


def test_the_file_is_looked_at_once_a_second_at_most(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add(file, Identity("acme"))
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    known = Keys(file)
    globex = keys.add(file, Identity("globex"))
    assert known.identify(globex) is None
    now = 101.1
    assert known.identify(globex) == Identity("globex")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"tenant": "acme", "admin": True},
        {"tenant": "../acme"},
        {"tenant": 7},
        {"admin": "yes"},
    ],
)
def test_a_key_is_either_a_tenants_or_an_operators(file: Path, record: dict[str, object]) -> None:
    file.write_text(json.dumps({"keys": [{"sha256": "0" * 64, **record}]}))
    with pytest.raises(InvalidRequest):
        keys.read(file)


def test_a_broken_file_is_not_told_to_be_made_by_what_refuses_it(file: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"No such file.*: make one with"):
        keys.read(file)
    file.write_text("{")
    with pytest.raises(InvalidRequest, match="repair it, or move it away"):
        keys.add(file, Identity("acme"))


def test_revoking_takes_a_digest_of_one_key(file: Path) -> None:
    keys.add(file, Identity("acme"))
    for digest in ("", "0" * 64):
        with pytest.raises(NotFound):
            keys.revoke(file, digest)
    assert len(keys.read(file)) == 1


def test_the_command_adds_lists_and_revokes(file: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "granatum.router.services.keys",
            *arguments,
            "--file",
            str(file),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    key = run("add", "--tenant", "acme").stdout.strip()
    assert Keys(file).identify(key) == Identity("acme")
    assert run("list").stdout == f"{keys.digest_of(key)[:16]} tenant acme\n"
    assert run("revoke", keys.digest_of(key)[:16]).stdout.endswith(" is revoked\n")
    assert run("list").stdout == ""
    assert file.stat().st_mode & 0o777 == 0o600
    refused = run("add", "--tenant", "../etc")
    assert refused.returncode == 1
    assert "tenant name" in refused.stderr


def test_a_key_bounds_the_priority_that_its_tenant_may_ask_for(file: Path) -> None:
    usual, high = keys.add(file, Identity("acme")), keys.add(file, Identity("acme", 7))
    known = Keys(file)
    assert [known.identify(key) for key in (usual, high)] == [
        Identity("acme", 0),
        Identity("acme", 7),
    ]
    for identity in (Identity("acme", 1001), Identity("acme", -1001), Identity(None, 7)):
        with pytest.raises(InvalidRequest, match="max_priority"):
            keys.add(file, identity)
    assert len(keys.read(file)) == 2


@pytest.mark.parametrize("bound", [1001, -(2**31), 1.5, "7", True, None])
def test_a_bound_that_is_none_is_no_keys_file(file: Path, bound: object) -> None:
    record = {"sha256": "0" * 64, "tenant": "acme", "max_priority": bound}
    file.write_text(json.dumps({"keys": [record]}))
    with pytest.raises(InvalidRequest):
        keys.read(file)


def test_the_command_takes_and_shows_the_bound(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("add", "--tenant", "acme", "--max-priority", "5"), ("list",)):
        monkeypatch.setattr(sys, "argv", ["keys", *arguments, "--file", str(file)])
        assert keys.main() == 0
    assert capsys.readouterr().out.endswith(" tenant acme, priority up to 5\n")


@pytest.mark.parametrize("command", [("add", "--admin"), ("list",), ("revoke", "0" * 64)])
def test_a_file_that_cannot_be_is_one_clear_line(file: Path, command: tuple[str, ...]) -> None:
    file.touch()
    arguments = (*command, "--file", str(file / "keys.json"))
    run = subprocess.run(
        [sys.executable, "-m", "granatum.router.services.keys", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert str(file / "keys.json") in line
