"""Adapters from the object store, by way of the local disk."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from granatum.adapters_store.store import AdapterStore
from granatum.runner.adapter_disk import DiskImages
from granatum.runner.adapter_image import ImageShape
from granatum.v1.errors import Unavailable

FETCH_S = 120.0
"""Longest time that the object store has for one adapter."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Says where adapters come from; can be pickled, and opened in the engine's process."""

    store: str
    """The object store's URL."""
    cache_dir: Path
    disk_bytes: int

    def __call__(self, shape: ImageShape) -> DiskImages:
        """Images of a shape. Raises InvalidRequest if the store cannot be."""
        store = AdapterStore.open(self.store, shape.base)

        def fetch(digest: str, directory: Path) -> Path:
            return asyncio.run(_fetch(store, digest, directory))

        return DiskImages(self.cache_dir, self.disk_bytes, shape, fetch)


async def _fetch(store: AdapterStore, digest: str, directory: Path) -> Path:
    try:
        async with asyncio.timeout(FETCH_S):
            files = await store.fetch(digest, directory)
    except TimeoutError as error:
        raise Unavailable(
            f"the object store did not bring adapter sha256:{digest} within {FETCH_S:g} s: "
            "try again"
        ) from error
    return files.config.parent
