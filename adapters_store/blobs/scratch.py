"""Room on the local disk for uploads on their way in."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from granatum.v1.errors import Overloaded


class Scratch:
    """A directory in which each upload gets one of its own, while the disk can hold them all."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._promised = 0

    @contextmanager
    def room(self, size_bytes: int) -> Iterator[Path]:
        """A directory with room for these bytes, removed in the end. Raises Overloaded."""
        if self._promised + size_bytes > shutil.disk_usage(self._parent).free:
            raise Overloaded(
                f"the server's disk has no room for {size_bytes:,} bytes beside the uploads under "
                "way: try again later",
                reason="NO_ROOM",
                retry_after_s=30.0,
            )
        self._promised += size_bytes
        path = Path(mkdtemp(prefix="upload-", dir=self._parent))
        try:
            yield path
        finally:
            self._promised -= size_bytes
            shutil.rmtree(path, ignore_errors=True)
