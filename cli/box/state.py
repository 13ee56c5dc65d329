"""The directory of a box's lasting state. It is private, and one box at a time uses it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from granatum.v1.errors import PreconditionFailed

_PRIVATE = 0o700


@contextmanager
def held(directory: Path, holder: str) -> Iterator[None]:
    """Keep other boxes out of `directory`. It is made if need be; other boxes are told `holder`.

    Raises PreconditionFailed if another box has it, or if it cannot be written.
    """
    with _explained(directory):
        make_private(directory)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _explained(directory):
            _lock(lock, directory)
            os.ftruncate(lock, os.pwrite(lock, holder.encode(), 0))
        yield
    finally:
        os.close(lock)


def make_private(directory: Path) -> None:
    """Make a directory, and missing ones above it, private. Directories that exist stay as is."""
    with _explained(directory):
        _make(directory)


def _make(directory: Path) -> None:
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(_PRIVATE, exist_ok=True)


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "starting"
        raise PreconditionFailed(
            f"{directory} is in use by another granatum up ({holder}): "
            "stop that one, or give this one a --state directory of its own"
        ) from None


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreconditionFailed(
            f"{directory} cannot be written ({error.strerror}): "
            "make room or rights there, or name another directory (--state, --logs)"
        ) from error
