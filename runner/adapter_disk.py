"""Adapter images on local disk, made from the object store's files when first asked for."""

import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from granatum.runner.adapter_image import (
    DamagedImage,
    ImageShape,
    build_image,
    image_pages,
    read_image,
    write_image,
)
from granatum.runner.adapter_layout import TableRow

_STALE_S = 3600.0

log = structlog.get_logger(__name__)

Fetch = Callable[[str, Path], Path]
"""Brings an adapter, by its digest, below a directory, and says where its two files are.

Blocks; raises GranatumError.
"""


class DiskImages:
    """Images of one shape under `directory`, at most `limit_bytes` of them, oldest use first out.

    Methods that block are for the loader's threads; two never work on one digest at a time.
    Processes may share the directory: a file that another removed is made again.
    """

    def __init__(self, directory: Path, limit_bytes: int, shape: ImageShape, fetch: Fetch) -> None:
        self._directory = directory / shape.key.hex()[:16]
        self._limit = limit_bytes
        self._shape = shape
        self._fetch = fetch
        self._lock = threading.Lock()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._pages: OrderedDict[str, int] = OrderedDict()
        self._scan()

    def size(self, digest: str) -> int | None:
        """Pages of an image that is there."""
        with self._lock:
            return self._pages.get(digest)

    def measure(self, digest: str) -> int:
        """Pages of the adapter; makes its image if there is none. Raises GranatumError."""
        size = self.size(digest)
        return self._make(digest) if size is None else size

    def read(self, digest: str, pages: Sequence[memoryview]) -> TableRow:
        """Read the image into page buffers, after making it where it is missing or damaged."""
        path = self._path(digest)
        try:
            row = read_image(path, digest, self._shape, pages)
        except (OSError, DamagedImage) as error:
            log.warning("adapter image is made again", digest=digest, reason=str(error))
            self._make(digest)
            row = read_image(path, digest, self._shape, pages)
        self._touch(digest)
        return row

    def _make(self, digest: str) -> int:
        """Bring the files and pack them; they are gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=".files-") as directory:
            image = build_image(self._fetch(digest, Path(directory)), self._shape)
        pages = int(image.pages.shape[0])
        write_image(self._path(digest), digest, self._shape, image)
        with self._lock:
            self._pages[digest] = pages
            self._pages.move_to_end(digest)
            self._shrink()
        return pages

    def _shrink(self) -> None:
        """Remove the oldest images over the limit, but never the newest."""
        held = sum(self._pages.values()) * self._shape.page_bytes
        while held > self._limit and len(self._pages) > 1:
            digest, pages = self._pages.popitem(last=False)
            self._path(digest).unlink(missing_ok=True)
            held -= pages * self._shape.page_bytes

    def _touch(self, digest: str) -> None:
        with self._lock:
            if digest in self._pages:
                self._pages.move_to_end(digest)
        with suppress(FileNotFoundError):
            os.utime(self._path(digest))  # so that the next start knows the order of use

    def _scan(self) -> None:
        """Find the images that an earlier process left, in the order of their use."""
        for path in self._directory.glob(".*"):  # what a killed process left half made
            if _used(path) < time.time() - _STALE_S:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        for path in sorted(self._directory.glob("*.image"), key=_used):
            try:
                self._pages[path.stem] = image_pages(path, self._shape)
            except (OSError, DamagedImage) as error:
                log.warning("adapter image is removed", file=path.name, reason=str(error))
                path.unlink(missing_ok=True)
        self._shrink()

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.image"


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
