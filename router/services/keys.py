"""The keys that a router knows, as its keys file holds them now."""

import time
from pathlib import Path

import structlog

from granatum.router.services.keys_file import Identity, digest_of, read
from granatum.v1.errors import GranatumError

_CHECK_S = 1.0

log = structlog.get_logger(__name__)


class Keys:
    """The keys of a file. A changed file is read again; a broken one leaves the keys as they were.

    Raises InvalidRequest if the file cannot be read at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._identities = read(path)
        self._check_at = time.monotonic() + _CHECK_S

    def identify(self, key: str) -> Identity | None:
        """Whom the key names, or None."""
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + _CHECK_S
            self._reload()
        return self._identities.get(digest_of(key))

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._identities = read(self._path)
            log.info("keys reloaded", keys=len(self._identities))
        except GranatumError as error:
            log.error("keys file is broken, the old keys stay", error=error.message)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file does; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
