"""Adapters from the object store, by way of the local disk."""

from dataclasses import dataclass
from pathlib import Path

from granatum.adapters_store.objects.location import open_objects
from granatum.runner.adapters.disk.disk import DiskImages
from granatum.runner.adapters.disk.fetching import Fetches
from granatum.runner.adapters.disk.packing import Packers
from granatum.runner.adapters.images.image import ImageShape


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where adapters come from. Made in the front, pickled, and opened in the engine's process."""

    store: str
    """The object store's URL."""
    cache_dir: Path
    disk_bytes: int

    def __call__(self, shape: ImageShape) -> DiskImages:
        """The images of a shape. Raises InvalidRequest if `store` is no store's URL."""
        fetches = Fetches(open_objects(self.store))
        packers = Packers(shape)
        return DiskImages(
            self.cache_dir, self.disk_bytes, shape, fetches.fetch, packers.pack, fetches.abandon
        )
