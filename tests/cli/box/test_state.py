"""A box's directory: private, written by one box at a time, and clear about what is wrong."""

from pathlib import Path

import pytest

from granatum.cli.box.state import held, make_private
from granatum.v1.errors import PreconditionFailed


def test_the_second_box_is_told_of_the_first(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with held(state, "process 123 on 127.0.0.1:7070"):
        for _ in range(2):  # the second must not have spoilt what the third reads
            said = pytest.raises(PreconditionFailed, match=r"process 123 on \S+:7070\).*--state")
            with said, held(state, "process 456"):
                pass
    with held(state, "process 456"):
        pass


def test_what_is_made_is_private_and_what_exists_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o755)
    (tmp_path / "own").chmod(0o755)
    state = tmp_path / "own" / "a" / "b"
    with held(state, "us"):
        make_private(state / "c")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o755
    for made in (state.parent, state, state / "c"):
        assert made.stat().st_mode & 0o777 == 0o700
    assert (state / "lock").stat().st_mode & 0o777 == 0o600


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = pytest.raises(PreconditionFailed, match=r"cannot be written.*--state")
    with said, held(tmp_path / "file" / "state", "us"):
        pass


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(PreconditionFailed, match="No space left"), held(tmp_path, "us"):
        pass
