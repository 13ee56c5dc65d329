"""Locks between processes that share a directory; a process that dies lets go of its locks."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOK_AGAIN_S = 0.05


@contextmanager
def locked(path: Path, patience_s: float) -> Iterator[None]:
    """Hold the lock of the file `path`; the file is removed with the lock.

    Raises TimeoutError if others hold the lock for longer than the patience, and OSError if the
    file cannot be made.
    """
    descriptor = _acquire(path, time.monotonic() + patience_s)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: whoever waits for this file then makes a new one
        os.close(descriptor)


def _acquire(path: Path, deadline: float) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if _try(descriptor) and _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} stays locked")
        time.sleep(_LOOK_AGAIN_S)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the locked file still stands under its name, where others find it."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
