"""Adapters from the object store, by way of the local disk."""

from dataclasses import dataclass
from pathlib import Path

from granatum.adapters_store.location import open_objects
from granatum.runner.adapter_disk import DiskImages
from granatum.runner.adapter_fetching import Fetches
from granatum.runner.adapter_image import ImageShape
from granatum.runner.adapter_packing import Packers


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Says where adapters come from; can be pickled, and opened in the engine's process."""

    store: str
    """The object store's URL."""
    cache_dir: Path
    disk_bytes: int

    def __call__(self, shape: ImageShape) -> DiskImages:
        """Images of a shape. Raises InvalidRequest if the store cannot be."""
        fetches = Fetches(open_objects(self.store))
        packers = Packers(shape)
        return DiskImages(
            self.cache_dir, self.disk_bytes, shape, fetches.fetch, packers.pack, fetches.abandon
        )
