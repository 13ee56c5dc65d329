"""Moves adapter images: disk to pinned host pages in threads, host to device on a side stream."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import structlog
import torch

from granatum.kernels.adapters import AdapterTable
from granatum.runner.adapters.images.file import DamagedImage
from granatum.runner.adapters.images.image import AdapterImage
from granatum.runner.adapters.images.layout import TableRow
from granatum.runner.adapters.mover import Copied, Event, Failed, Measured, Read, abandoned
from granatum.v1.errors import GranatumError, Internal, InvalidRequest

QUICK_BYTES = 160 << 20
"""The largest copy that may delay a step: 3.1 ms at 54 GB/s. A 7B model's shortest step takes 4."""
CHUNK_BYTES = 256 << 20
"""Host memory is pinned in pieces of this size: torch rounds each up to a power of two."""
FETCHES = 64
"""Loads from the object store at a time. Most of them wait, and some may hang until they are given
up; others must not wait for those.
"""
READS = 4
"""Images read from the disk at a time; the store has no part in them."""

log = structlog.get_logger(__name__)


class ImageSource(Protocol):
    """Where images come from. `measure` and `read` block and raise GranatumError."""

    def size(self, digest: str) -> int | None:
        """Pages of the adapter, where that is known at once."""
        ...

    def measure(self, digest: str) -> int:
        """Pages of the adapter."""
        ...

    def read(self, digest: str, pages: Sequence[memoryview]) -> TableRow:
        """Fill page buffers with the image; DamagedImage if `measure` must make it again first."""
        ...

    def abandon(self, digest: str) -> None:
        """Give up what `measure` is bringing: it raises then, soon."""
        ...


class MemoryImages:
    """Images that are in memory already: for measurements, and tests without files."""

    def __init__(self, images: dict[str, AdapterImage]) -> None:
        self.images = images

    def size(self, digest: str) -> int | None:
        """Pages of the adapter."""
        image = self.images.get(digest)
        return None if image is None else int(image.pages.shape[0])

    def measure(self, digest: str) -> int:
        """Pages of the adapter; KeyError if there is none."""
        return int(self.images[digest].pages.shape[0])

    def read(self, digest: str, pages: Sequence[memoryview]) -> TableRow:
        """Copy the image into page buffers."""
        image = self.images[digest]
        for source, target in zip(image.pages.view(np.uint8), pages, strict=True):
            target[:] = source.data
        return image.row

    def abandon(self, digest: str) -> None:
        """Nothing is on its way."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy to the device that has been launched."""

    digest: str
    arrived: torch.cuda.Event

    @property
    def has_landed(self) -> bool:
        """Whether pages and table row are there."""
        return bool(self.arrived.query())  # type: ignore[no-untyped-call]


class AdapterLoader:
    """The mover of an AdapterCache (runner/adapters/cache.py), for one arena and one adapter table.

    `arena` is `[pages, page_elements]`; `table` is written in the same stream as the pages, before
    the event that tells of both. Host memory is at most `host_cache_bytes`, taken at once. Only
    `events` and the calls of `Mover` belong to the engine's thread. Other threads write host pages,
    the row of an image that they have read, and the queue of events; nothing on the device.
    """

    def __init__(
        self, arena: torch.Tensor, table: AdapterTable, source: ImageSource, host_cache_bytes: int
    ) -> None:
        self._arena = arena
        self._table = table
        self._source = source
        self._stream = _stream(arena.device)
        self._host = _host_pages(arena, host_cache_bytes)
        self._buffers = [page.view(torch.uint8).numpy().data for page in self._host]
        self._rows: dict[int, TableRow] = {}  # by the image's first host page
        self._stage = _Stage(table, pin=self._stream is not None)
        self._copies: list[_Copy] = []
        self._ended: SimpleQueue[Event] = SimpleQueue()
        self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="adapter-load")
        self._readers = ThreadPoolExecutor(READS, thread_name_prefix="adapter-read")

    @property
    def host_pages(self) -> int:
        """Pages of host memory."""
        return len(self._host)

    @property
    def quick_pages(self) -> int:
        """Pages that are copied to the device within the shortest step or so."""
        return QUICK_BYTES // (self._arena[0].numel() * self._arena.element_size())

    def size(self, digest: str) -> int | None:
        """Pages of the adapter, where that is known without I/O."""
        return self._source.size(digest)

    def measure(self, digest: str) -> Callable[[], None]:
        """Find how many pages the adapter takes, in a thread; what is returned gives that up."""
        begun = self._fetchers.submit(
            self._end, digest, lambda: Measured(digest, self._source.measure(digest))
        )

        def give_up() -> None:
            if begun.cancel():
                self._ended.put(Failed(digest, abandoned()))
            else:
                self._source.abandon(digest)

        return give_up

    def read(self, digest: str, host_pages: tuple[int, ...]) -> None:
        """Bring the image into host pages, in a thread."""
        buffers = [self._buffers[page] for page in host_pages]

        def bring() -> Event:
            self._rows[host_pages[0]] = self._stage.checked(self._source.read(digest, buffers))
            return Read(digest)

        def make_again() -> Event:
            self._source.measure(digest)
            return bring()

        def attempt() -> None:
            try:
                event = bring()
            except DamagedImage:  # its files come from the store, which the readers do not wait for
                self._fetchers.submit(self._end, digest, make_again)
            except Exception as error:
                self._ended.put(_failed(digest, error))
            else:
                self._ended.put(event)

        self._readers.submit(attempt)

    def copy(
        self, digest: str, slot: int, host_pages: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        """Launch the copy of each page, then of the slot's table row."""
        row = self._rows[host_pages[0]]
        if self._stream is None:
            self._launch(slot, row, host_pages, pages)
            self._ended.put(Copied(digest))
            return
        with torch.cuda.stream(self._stream):
            self._launch(slot, row, host_pages, pages)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        self._copies.append(_Copy(digest, arrived))

    def fence(self, digest: str) -> None:
        """Have the current stream wait for the copy; on a CPU it has ended already."""
        for copy in self._copies:
            if copy.digest == digest:
                torch.cuda.current_stream(self._arena.device).wait_event(copy.arrived)

    def events(self) -> list[Event]:
        """What has ended since the last call."""
        ended: list[Event] = []
        while self._copies and self._copies[0].has_landed:  # one stream: they end in order
            ended.append(Copied(self._copies.pop(0).digest))
        while True:
            try:
                ended.append(self._ended.get_nowait())
            except Empty:
                return ended

    def close(self) -> None:
        """End the threads, after what they are doing now."""
        for threads in (self._fetchers, self._readers):
            threads.shutdown(wait=True, cancel_futures=True)

    def _launch(
        self, slot: int, row: TableRow, host_pages: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        for host_page, page in zip(host_pages, pages, strict=True):
            self._arena[page].copy_(self._host[host_page], non_blocking=True)
        self._stage.write(slot, row, pages, self._arena.shape[1])

    def _end(self, digest: str, work: Callable[[], Event]) -> None:
        """Do the work, and tell how it ended."""
        try:
            event = work()
        except Exception as error:
            event = _failed(digest, error)
        self._ended.put(event)


class _Stage:
    """A host copy of the adapter table, pinned if there is a GPU.

    A slot's row is written here and copied from here; the slot is taken again only after that copy
    has ended, so no row changes under it.
    """

    def __init__(self, table: AdapterTable, *, pin: bool) -> None:
        self._max_rank = table.max_rank
        self._device = (table.a, table.b, table.rank, table.scale)
        self._host = tuple(
            torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pin) for tensor in self._device
        )

    def checked(self, row: TableRow) -> TableRow:
        """The row, after two checks: ranks within the table's largest, finite scales.

        Raises:
            InvalidRequest: which limit of this runner it breaks.
        """
        rank = int(row.rank.max(initial=0))
        if rank > self._max_rank or row.rank.min(initial=0) < 0:
            raise InvalidRequest(
                f"the adapter has a projection of rank {rank} and this runner takes up to "
                f"{self._max_rank}: start it with --max-rank {rank}, or use a lower rank",
                reason="ADAPTER_RANK_TOO_HIGH",
            )
        if not np.isfinite(row.scale).all():
            raise InvalidRequest(
                "the adapter's lora_alpha / r is not finite: use a smaller lora_alpha",
                reason="ADAPTER_SCALE",
            )
        return row

    def write(self, slot: int, row: TableRow, pages: tuple[int, ...], page_elements: int) -> None:
        """Copy the row of an adapter that lies in `pages` to the table, in stream order."""
        self.checked(row)
        a, b = row.resolve(pages, page_elements)
        arrays = (a, b, row.rank, row.scale)
        for array, host, device in zip(arrays, self._host, self._device, strict=True):
            host[slot].numpy()[...] = array
            device[slot].copy_(host[slot], non_blocking=True)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _failed(digest: str, error: Exception) -> Failed:
    """The error for others; details stay in the log."""
    if isinstance(error, GranatumError):
        return Failed(digest, error)
    log.error("adapter load", digest=digest, exc_info=error)
    return Failed(
        digest, Internal("the adapter could not be loaded: the runner's log has the details")
    )


def _host_pages(arena: torch.Tensor, host_cache_bytes: int) -> list[torch.Tensor]:
    """Pages of host memory that fit `host_cache_bytes`, pinned in chunks where there is a GPU."""
    page_bytes = arena.shape[1] * arena.element_size()
    count, per_chunk = host_cache_bytes // page_bytes, max(CHUNK_BYTES // page_bytes, 1)
    pages: list[torch.Tensor] = []
    while len(pages) < count:
        chunk = torch.empty(
            min(per_chunk, count - len(pages)),
            arena.shape[1],
            dtype=arena.dtype,
            pin_memory=arena.device.type == "cuda",
        )
        pages += chunk.unbind()
    return pages
