"""The keys file: what it takes, and what it says of what it does not take."""

import json
from pathlib import Path

import pytest

from granatum.router.services.keys_file import Identity, add, read, revoke
from granatum.v1.errors import InvalidRequest, NotFound, PreconditionFailed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


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
        read(file)


def test_a_broken_file_is_not_told_to_be_made_by_what_refuses_it(file: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"No such file.*: make one with"):
        read(file)
    file.write_text("{")
    with pytest.raises(InvalidRequest, match="repair it, or move it away"):
        add(file, Identity("acme"))


def test_revoking_takes_a_digest_of_one_key(file: Path) -> None:
    add(file, Identity("acme"))
    for digest in ("", "0" * 64):
        with pytest.raises(NotFound):
            revoke(file, digest)
    assert len(read(file)) == 1


@pytest.mark.parametrize("bound", [1001, -(2**31), 1.5, "7", True, None])
def test_a_bound_that_is_none_is_no_keys_file(file: Path, bound: object) -> None:
    record = {"sha256": "0" * 64, "tenant": "acme", "max_priority": bound}
    file.write_text(json.dumps({"keys": [record]}))
    with pytest.raises(InvalidRequest):
        read(file)


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    file = tmp_path / "misspelt" / "keys.json"
    with pytest.raises(PreconditionFailed, match="No such file or directory"):
        add(file, Identity("acme"))
    assert not file.parent.exists()
