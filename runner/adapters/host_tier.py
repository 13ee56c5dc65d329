"""Adapter images in host memory, and which of them give way. No torch."""

from collections import OrderedDict
from collections.abc import Callable

from granatum.runner.adapters.entry import Entry
from granatum.runner.pages import PagePool


class HostTier:
    """`total` host pages, and the images in them."""

    def __init__(self, total: int) -> None:
        self._pool = PagePool(total)
        self._images: OrderedDict[str, Entry] = OrderedDict()  # the last request's image comes last

    @property
    def total(self) -> int:
        """Host pages, free or not."""
        return self._pool.total

    @property
    def free_pages(self) -> int:
        """Host pages without an image."""
        return self._pool.free_pages

    def touch(self, entry: Entry) -> None:
        """Note a request for the adapter."""
        if entry.digest in self._images:
            self._images.move_to_end(entry.digest)

    def take(self, entry: Entry) -> None:
        """Give the image its pages; there must be enough free ones."""
        pages = self._pool.allocate(entry.size)
        assert pages is not None
        entry.host_pages = pages
        self._images[entry.digest] = entry

    def drop(self, entry: Entry) -> None:
        """Free the image's pages, if it has any."""
        if entry.host_pages:
            self._pool.free(entry.host_pages)
            entry.host_pages = ()
            del self._images[entry.digest]

    def make_room(self, pages: int, can_go: Callable[[Entry], bool]) -> list[Entry] | None:
        """Drop images that can go, oldest request first, until `pages` pages are free.

        Returns the dropped images. Returns None, and drops nothing, if that cannot make the room.
        """
        missing = pages - self._pool.free_pages
        dropped: list[Entry] = []
        for entry in self._images.values():
            if missing <= 0:
                break
            if can_go(entry):
                dropped.append(entry)
                missing -= entry.size
        if missing > 0:
            return None
        for entry in dropped:
            self.drop(entry)
        return dropped
