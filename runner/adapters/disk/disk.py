"""Adapter images on local disk, made from the object store's files when first asked for.

    cache directory/<shape>/<digest>.image

Runners may share the directory. One of them makes each image, under a lock. The limit counts the
images of all runners. Files that no runner wrote are left alone.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from granatum.adapters_store.names import check_digest
from granatum.runner.adapters.disk.lock import locked
from granatum.runner.adapters.disk.packing import pack_image
from granatum.runner.adapters.images.file import DamagedImage, image_pages, read_image
from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.adapters.images.layout import TableRow
from granatum.v1.errors import InvalidAdapter, Unavailable

MAKING_S = 180.0
"""The longest wait for another runner that makes the same image: fetching and packing take less."""
_SHRINKING_S = 5.0
_RETRY_AFTER_S = 5.0
_IMAGE = re.compile(r"[0-9a-f]{64}\.image")
_LOCK = re.compile(r"[0-9a-f]{64}\.lock")
_HALF_MADE = re.compile(r"\.files-([0-9a-f]{64})-.*")
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = structlog.get_logger(__name__)

Fetch = Callable[[str, Path], Path]
"""Fetches the adapter of a digest below a directory; returns the folder of its two files.

Blocks. Raises GranatumError.
"""
Pack = Callable[[Path, Path, str], int]
"""Packs the files of a folder into the image file of a digest; returns the image's pages.

Blocks. Raises GranatumError.
"""


@dataclass(frozen=True, slots=True)
class _Found:
    """An image file in the directory."""

    path: Path
    used_ns: int
    size: int


class DiskImages:
    """Images of one shape under `directory`.

    The directory holds at most `limit_bytes` of images of all shapes; the image whose last use is
    oldest goes first. The loader's threads call the methods that block; two of them never work on
    one digest at a time. An image that another process removed is made again.
    """

    def __init__(
        self,
        directory: Path,
        limit_bytes: int,
        shape: ImageShape,
        fetch: Fetch,
        pack: Pack | None = None,
        abandon: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._root = directory
        self._directory = directory / shape.key.hex()[:16]
        self._limit = limit_bytes
        self._shape = shape
        self._fetch = fetch
        self._pack = pack or partial(pack_image, shape)
        self._abandon = abandon
        self._pages: dict[str, int] = {}
        self._scan()

    def size(self, digest: str) -> int | None:
        """Pages of the digest's image; None if no image is known."""
        return self._pages.get(digest)

    def measure(self, digest: str) -> int:
        """Pages of the adapter. If it has no image, the image is made. Raises GranatumError."""
        with _translated(digest):
            path = self._path(check_digest(digest))
            self._directory.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock"), MAKING_S):
                pages = self._look(path) or self._make(digest, path)
        self._pages[digest] = pages
        return pages

    def read(self, digest: str, pages: Sequence[memoryview]) -> TableRow:
        """Read the image into page buffers. Raises DamagedImage if the image must be made again."""
        path = self._path(digest)
        try:
            row = read_image(path, digest, self._shape, pages)
        except (OSError, DamagedImage) as error:
            log.warning("adapter image cannot be read", digest=digest, reason=str(error))
            self._pages.pop(digest, None)
            if isinstance(error, DamagedImage) or error.errno == errno.EIO:
                _remove(path)
            raise DamagedImage(f"{path} cannot be read") from error
        _touch(path)
        return row

    def abandon(self, digest: str) -> None:
        """Give up the fetching of a digest: its `measure` soon raises."""
        self._abandon(digest)

    def _look(self, path: Path) -> int | None:
        """Pages of a whole image; None if there is none. A damaged one is removed."""
        try:
            return image_pages(path, self._shape)
        except OSError:
            return None
        except DamagedImage as error:
            log.warning("adapter image is removed", file=path.name, reason=str(error))
            _remove(path)
            return None

    def _make(self, digest: str, path: Path) -> int:
        """Fetch the files and pack them; the files are removed afterwards."""
        with tempfile.TemporaryDirectory(
            dir=self._directory, prefix=f".files-{digest}-", ignore_cleanup_errors=True
        ) as name:
            directory = Path(name)
            packed = directory / path.name
            pages = self._pack(self._fetch(digest, directory), packed, digest)
            packed.replace(path)
        _touch(path)
        self._shrink(path)
        return pages

    def _shrink(self, newest: Path) -> None:
        """Remove the oldest images over the limit, but never the newest."""
        try:
            with locked(self._root / "limit.lock", _SHRINKING_S):
                found = sorted(self._find(), key=lambda image: image.used_ns)
                held = sum(image.size for image in found)
                for image in found:
                    if held <= self._limit:
                        return
                    if image.path != newest and _remove(image.path):
                        held -= image.size
        except OSError as error:
            log.warning("adapter images over the limit remain", reason=str(error))

    def _find(self) -> Iterator[_Found]:
        """The images of all runners and shapes in the directory."""
        for path in self._root.glob("*/*.image"):
            with suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and _IMAGE.fullmatch(path.name):
                    yield _Found(path, status.st_mtime_ns, self._counted(path, status.st_size))

    def _counted(self, path: Path, size: int) -> int:
        """The bytes of an image that count against the limit: of our own shape, only its pages."""
        is_ours = path.parent == self._directory
        return size - size % self._shape.page_bytes if is_ours else size

    def _scan(self) -> None:
        """Find the images of the directory. A broken disk fails loads, not the engine's start."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._clear_half_made()
            for path in self._directory.glob("*.image"):
                self._take_in(path)
            self._shrink(self._directory)
        except OSError as error:
            log.error("adapter cache cannot be used", directory=str(self._root), reason=str(error))

    def _take_in(self, path: Path) -> None:
        if _IMAGE.fullmatch(path.name) is None or path.is_dir():
            log.warning("a file that is no adapter image is left alone", file=path.name)
            return
        with suppress(InvalidAdapter):  # made by a runner with a larger --max-rank
            pages = self._look(path)
            if pages is not None:
                self._pages[path.stem] = pages

    def _clear_half_made(self) -> None:
        """Remove half-made files that nobody has locked: their process was killed."""
        for path in self._directory.glob(".files-*"):
            if named := _HALF_MADE.fullmatch(path.name):
                lock = self._directory / f"{named[1]}.lock"
                with suppress(OSError), locked(lock, 0):
                    shutil.rmtree(path, ignore_errors=True)
        for path in self._directory.glob("*.lock"):
            if _LOCK.fullmatch(path.name):
                with suppress(OSError), locked(path, 0):
                    pass  # nobody held the lock: letting go of it removes the file

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.image"


def _remove(path: Path) -> bool:
    """Remove a file; whether it is gone. A directory stays, for no runner made it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning("adapter image cannot be removed", file=path.name, reason=str(error))
        return False
    return True


def _touch(path: Path) -> None:
    """Note the use for all processes, in finer time than the file system's own clock."""
    now = time.time_ns()
    with suppress(OSError):
        os.utime(path, ns=(now, now))


@contextmanager
def _translated(digest: str) -> Iterator[None]:
    """Turn what the local disk raises into Unavailable."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable(
            "another runner has been loading this adapter for too long: try again",
            reason="ADAPTER_LOAD_STALLED",
            retry_after_s=_RETRY_AFTER_S,
        ) from error
    except FileNotFoundError:
        raise  # not the disk's fault
    except OSError as error:
        full = error.errno in _FULL
        log.error("adapter cache failed", digest=digest, reason=str(error))
        raise Unavailable(
            f"the runner's disk for adapters {'is full' if full else 'cannot be used'}: try again; "
            "its operator must look at --cache-dir",
            reason="ADAPTER_DISK_FULL" if full else "ADAPTER_DISK",
            retry_after_s=_RETRY_AFTER_S,
        ) from error
