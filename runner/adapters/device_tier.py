"""Adapters in device memory: their pages and slots, their users, and their copies. No torch."""

from collections import OrderedDict, deque
from collections.abc import Iterable

from granatum.runner.adapters.entry import Entry, State
from granatum.runner.pages import PagePool


class DeviceTier:
    """The adapters in `slots` rows of the adapter table. They share the pages of `pool` with KV.

    An adapter with a user stays. Its pages are free again as soon as it leaves: whoever releases
    an adapter knows that no launched step uses it, so a copy may overwrite the pages at once.
    """

    def __init__(self, pool: PagePool, slots: int) -> None:
        self._pool = pool
        self._free_slots = list(range(slots - 1, -1, -1))
        self._copying: deque[Entry] = deque()  # copies end in this order
        self._landed: dict[str, Entry] = {}
        self._idle: OrderedDict[str, Entry] = OrderedDict()  # landed, no users; oldest use first
        self._resident: tuple[str, ...] | None = ()
        self.idle_pages = 0
        """Pages of the adapters without users."""
        self.loads = 0
        """Adapters copied to the device so far."""

    @property
    def total(self) -> int:
        """Device pages, free or not."""
        return self._pool.total

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters on the device; the same object until they change."""
        if self._resident is None:
            self._resident = tuple(self._landed)
        return self._resident

    @property
    def idle(self) -> tuple[Entry, ...]:
        """The adapters without users, oldest use first."""
        return tuple(self._idle.values())

    @property
    def oldest_copy(self) -> Entry | None:
        """The copy that ends next."""
        return self._copying[0] if self._copying else None

    def missing(self, size: int) -> tuple[int, int]:
        """How many pages and slots must become free before an adapter of `size` pages fits."""
        return max(size - self._pool.free_pages, 0), 0 if self._free_slots else 1

    def take(self, entry: Entry) -> None:
        """Give the adapter pages and a slot, which its copy then fills; there must be enough."""
        pages = self._pool.allocate(entry.size)
        assert pages is not None
        entry.pages, entry.slot, entry.state = pages, self._free_slots.pop(), State.COPYING
        self._copying.append(entry)

    def land(self, entry: Entry) -> None:
        """The oldest copy has ended."""
        oldest = self._copying.popleft()
        assert oldest is entry, "a copy overtook another"
        entry.state = State.RESIDENT
        self._landed[entry.digest] = entry
        self._resident = None
        self.loads += 1
        self._idle_if_unused(entry)

    def acquire(self, entry: Entry) -> int:
        """One user more; the adapter's slot."""
        entry.users += 1
        if self._idle.pop(entry.digest, None) is not None:
            self.idle_pages -= entry.size
        return entry.slot

    def release(self, entry: Entry) -> None:
        """One user less."""
        assert entry.users > 0, "released more often than acquired"
        entry.users -= 1
        self._idle_if_unused(entry)

    def evict(self, pages: int, slots: int, victims: Iterable[Entry]) -> list[Entry]:
        """Take the first of `victims`, all of them idle, off the device.

        Evicts just enough to free `pages` pages and `slots` slots, and returns them. If all victims
        do not suffice, evicts none.
        """
        chosen: list[Entry] = []
        freed = 0
        for victim in victims:
            if freed >= pages and len(chosen) >= slots:
                break
            chosen.append(victim)
            freed += victim.size
        if freed < pages or len(chosen) < slots:
            return []
        for victim in chosen:
            self._leave(victim)
        return chosen

    def _idle_if_unused(self, entry: Entry) -> None:
        if entry.state is State.RESIDENT and not entry.users:
            self._idle[entry.digest] = entry
            self.idle_pages += entry.size

    def _leave(self, entry: Entry) -> None:
        del self._idle[entry.digest], self._landed[entry.digest]
        self.idle_pages -= entry.size
        self._pool.free(entry.pages)
        self._free_slots.append(entry.slot)
        entry.pages, entry.slot, entry.state = (), -1, State.IN_HOST
        self._resident = None
