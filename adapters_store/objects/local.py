"""Adapters in a local directory, durably, and safe for several routers on one machine.

obstore's local store writes without fsync and has no conditional update. Its listing fails if one
name is not UTF-8 or one link leads back. So this class writes and lists, and obstore reads and
deletes.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import obstore
from obstore.store import LocalStore

from granatum.adapters_store.objects.objects import Listed, Objects, Stored, translated

_ATTEMPTS = 10


class LocalObjects(Objects):
    """Objects as files under a directory.

    root/<key>           the objects
    root/.scratch/       files on their way in: same file system, so that they are only renamed
    root/.locks/<key>    one lock per object that is swapped
    """

    def __init__(self, root: Path) -> None:
        self._local = LocalStore(root, automatic_cleanup=True)
        super().__init__(self._local)
        self._root = root
        for path in (self.scratch, root / ".locks"):
            path.mkdir(exist_ok=True)

    @property
    def scratch(self) -> Path:
        """A directory on the file system of the objects."""
        return self._root / ".scratch"

    async def clear_scratch(self, before: float) -> None:
        """Remove what killed processes left in `scratch` before that Unix time."""
        with translated("clear", self.scratch.name):
            await asyncio.to_thread(self._clear_scratch, before)

    async def swap(self, key: str, data: bytes, known: Stored | None) -> Stored | None:
        """Write the object if it is still `known` (None: absent); return None if it is not."""
        with translated("write", key):
            return await asyncio.to_thread(self._swap, key, data, known)

    async def put(self, key: str, data: bytes) -> None:
        """Write the object, whatever there is."""
        with translated("write", key):
            await asyncio.to_thread(self._write, key, data)

    async def put_file(self, key: str, path: Path) -> None:
        """Write a file's bytes. `path` should lie in `scratch`: it is linked, not copied."""
        with translated("write", key):
            await asyncio.to_thread(self._link, key, path)

    async def listing(self, prefix: str) -> list[Listed]:
        """The objects below the directory `prefix`, sorted by key; links are not followed."""
        with translated("list", prefix):
            return await asyncio.to_thread(self._listing, prefix)

    def _listing(self, prefix: str) -> list[Listed]:
        self.scratch.stat()  # raises if the store is away: it must not pass for empty
        return sorted(self._files(prefix), key=lambda listed: listed.key)

    def _files(self, prefix: str) -> Iterator[Listed]:
        for folder, _, names in os.walk(self._root / prefix, onerror=_unless_gone):
            for path in (Path(folder, name) for name in names):
                size = _size(path)
                if size is not None:
                    yield Listed(path.relative_to(self._root).as_posix(), size)

    def _clear_scratch(self, before: float) -> None:
        for path in self.scratch.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime >= before:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _swap(self, key: str, data: bytes, known: Stored | None) -> Stored | None:
        with self._locked(key):
            if self._etag(key) != (known.version["e_tag"] if known else None):
                return None
            self._write(key, data)
            etag = self._etag(key)
            assert etag is not None
            return Stored(data, {"e_tag": etag})

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with (self._root / ".locks" / key.replace("/", "~")).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _etag(self, key: str) -> str | None:
        try:
            return obstore.head(self._local, key)["e_tag"]
        except FileNotFoundError:
            return None

    def _write(self, key: str, data: bytes) -> None:
        temporary = self.scratch / uuid4().hex
        temporary.write_bytes(data)
        self._move(temporary, key)

    def _link(self, key: str, path: Path) -> None:
        temporary = self.scratch / uuid4().hex
        try:
            temporary.hardlink_to(path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, temporary)
        self._move(temporary, key)

    def _move(self, temporary: Path, key: str) -> None:
        """Put a file in an object's place, on disk before it shows."""
        try:
            _sync(temporary)
            target = self._root / key
            for _ in range(_ATTEMPTS):
                # Another process deletes an object together with its directory, maybe the new one.
                with suppress(FileNotFoundError):
                    _make_directory(target.parent)
                    temporary.replace(target)
                    _sync(target.parent)
                    return
            raise FileNotFoundError(f"{target.parent} keeps vanishing")
        finally:
            temporary.unlink(missing_ok=True)


def _unless_gone(error: OSError) -> None:
    """Raise unless the directory is gone.

    A directory that cannot be listed must not pass for empty, or collection would delete bytes that
    its catalogs refer to.
    """
    if not isinstance(error, FileNotFoundError):
        raise error


def _size(path: Path) -> int | None:
    """A file's size; None if it was deleted meanwhile, or is a link to nowhere."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError:
        if path.is_symlink():
            return None
        raise


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
