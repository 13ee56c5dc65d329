"""Where benchmarks' engines get adapters: any number of digests over few random numbers.

Adapter i's digest is i in 64 hexadecimal digits. On the device every digest has pages of its own,
so that kernels read as many bytes as if the contents differed.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from granatum.runner.adapters.images.file import read_image, write_image
from granatum.runner.adapters.images.image import AdapterImage, ImageShape, random_image
from granatum.runner.adapters.images.layout import TableRow


def digest_of(adapter: int) -> str:
    """An adapter's digest."""
    return f"{adapter:064x}"


class MemoryTwins:
    """Every adapter has the same random image, which lies in memory."""

    def __init__(self, shape: ImageShape, rank: int) -> None:
        self._image = random_image(shape, rank, seed=0)

    def size(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """Pages of each adapter."""
        return int(self._image.pages.shape[0])

    measure = size

    def read(self, digest: str, pages: Sequence[memoryview]) -> TableRow:  # noqa: ARG002
        """Copy the image into page buffers."""
        for source, target in zip(self._image.pages.view(np.uint8), pages, strict=True):
            target[:] = source.data
        return self._image.row

    def abandon(self, digest: str) -> None:
        """Nothing is on its way."""


class FileImages:
    """Random images in `files` files below `directory`: adapter i's is number i modulo `files`."""

    def __init__(self, shape: ImageShape, rank: int, directory: Path, files: int) -> None:
        self._shape = shape
        self._directory = directory / f"{shape.key.hex()[:16]}-{rank}"
        self._files = files
        self._cold = False
        self._directory.mkdir(parents=True, exist_ok=True)
        image = random_image(shape, rank, seed=0)
        self._pages = int(image.pages.shape[0])
        self._cleaner = ThreadPoolExecutor(1)
        for number in range(files):
            self._write(number, image)

    def size(self, digest: str) -> int:  # noqa: ARG002 - the protocol's signature
        """Pages of each adapter."""
        return self._pages

    measure = size

    def cool(self) -> None:
        """Have every read be one of the disk from now on.

        What is read leaves the operating system's cache, so that a file's next read is so too.
        """
        self._cold = True
        for number in range(self._files):
            _forget(self._path(number))

    def read(self, digest: str, pages: Sequence[memoryview]) -> TableRow:
        """Read the image's file into page buffers."""
        number = int(digest, 16) % self._files
        path = self._path(number)
        row = read_image(path, digest_of(number), self._shape, pages)
        if self._cold:
            self._cleaner.submit(_forget, path)  # nobody waits for that
        return row

    def abandon(self, digest: str) -> None:
        """Nothing is on its way."""

    def _write(self, number: int, image: AdapterImage) -> None:
        path = self._path(number)
        if not path.is_file():
            shifted = AdapterImage(np.roll(image.pages, number, 0), image.row)
            write_image(path, digest_of(number), self._shape, shifted)
        _forget(path)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number}.image"


def _forget(path: Path) -> None:
    """Take a file out of the operating system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
