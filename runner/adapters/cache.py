"""Which adapters are on the device, which are on their way, and which give way. No torch.

    object store, local disk ── measure, read ──> host pages ── copy ──> device pages and a slot

Deciding is here, moving is behind `Mover` (adapter_mover.py); nothing here blocks. An adapter that
runs a sequence never leaves. Others leave least recently used first: the device for KV or for
another adapter, the host pages for another image. Pages are given up only after `release`, which
the scheduler calls when no launched step uses them, so a copy may overwrite them at once.

The next step may use an adapter before its copy has ended: the device waits for the copy. Mostly
there is no wait, for the copy has as long as the step in flight takes. Only the oldest copy may
delay a step, and only if it is short. A step uses the other copies once they have landed.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

import structlog

from granatum.runner.adapters.backoff import Backoff
from granatum.runner.adapters.entry import Entry, State
from granatum.runner.adapters.mover import Copied, Event, Failed, Measured, Mover, Read
from granatum.runner.adapters.residency import AdapterFigures
from granatum.runner.adapters.trouble import LoadTrouble
from granatum.runner.engine.scheduling.pages import PagePool
from granatum.v1.errors import GranatumError, InvalidRequest

PATIENCE_S = 1.0
"""After so long a load may displace an adapter that another waiting sequence asks for. If it finds
no room even so, it holds up the others no longer.
"""
ABANDON_S = 10.0
"""A fetch ends when no sequence has asked for its adapter for so long. A waiting sequence asks in
every step, unless it stands far back in the queue.
"""

log = structlog.get_logger(__name__)


class AdapterCache:
    """The adapters of one engine, in `slots` rows of the adapter table. `clock` gives seconds."""

    def __init__(
        self,
        pool: PagePool,
        mover: Mover,
        slots: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._mover = mover
        self._clock = clock
        self._host = PagePool(mover.host_pages)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._entries: dict[str, Entry] = {}
        self._pending: dict[str, Entry] = {}  # on their way, in the order they were asked for
        self._copying: deque[Entry] = deque()  # they land in this order
        self._idle: OrderedDict[str, Entry] = OrderedDict()  # resident without users, oldest first
        self._idle_pages = 0
        self._hosted: OrderedDict[str, Entry] = OrderedDict()  # with host pages, oldest first
        self._backoffs: dict[str, Backoff] = {}
        self._trouble = LoadTrouble(clock)
        self._round = 0
        self._loads = 0
        self._resident: tuple[str, ...] | None = ()

    @property
    def figures(self) -> AdapterFigures:
        """What is on the device now."""
        if self._resident is None:
            resident = (e.digest for e in self._entries.values() if e.state is State.RESIDENT)
            self._resident = tuple(resident)
        return AdapterFigures(self._resident, self._loads, self._idle_pages, self._trouble.text)

    def acquire(self, digest: str) -> int | None:
        """The adapter's slot for steps launched after `await_copy`, with one user more.

        None while it is being brought: the first call starts that, later ones poll. Raises
        GranatumError if it cannot be had; the same error for everybody until it is tried again.
        """
        entry = self._entries.get(digest) or self._begin(digest)
        entry.asked, entry.asked_s = self._round, self._clock()
        if entry.digest in self._hosted:
            self._hosted.move_to_end(digest)
        if entry.state is not State.RESIDENT and digest not in self._pending:
            entry.since = entry.asked_s
            self._pending[digest] = entry
            self._advance()
        if not self._is_usable(entry):
            return None
        entry.users += 1
        self._stop_idling(entry)
        return entry.slot

    def release(self, digest: str) -> None:
        """One user less; no launched step uses the adapter on this user's behalf."""
        entry = self._entries[digest]
        assert entry.users > 0, "released more often than acquired"
        entry.users -= 1
        self._idle_if_unused(entry)

    def pages_of(self, digest: str) -> int:
        """Pages that an acquired adapter takes."""
        return self._entries[digest].size

    def poll(self) -> None:
        """Once per step: take in what has ended and begin what has become possible."""
        self._round += 1
        for event in self._mover.events():
            self._take(event)
        self._advance()

    def await_copy(self) -> None:
        """Have the device end the copy of an adapter in use before it runs what comes next."""
        if self._copying and self._copying[0].users:
            self._mover.fence(self._copying[0].digest)

    def reclaim(self, pages: int) -> int:
        """Free at least `pages` pages of unused adapters, oldest first; how many it was.

        Those that nobody waits for go first. Nothing is freed if there are not so many.
        """
        return self._evict(pages, 0, sorted(self._idle.values(), key=self._is_wanted))

    def _is_usable(self, entry: Entry) -> bool:
        """Whether the next step may use it: it is there, or the oldest on its way, and quick."""
        if entry.state is not State.COPYING:
            return entry.state is State.RESIDENT
        return entry is self._copying[0] and entry.size <= self._mover.quick_pages

    def _idle_if_unused(self, entry: Entry) -> None:
        if entry.state is State.RESIDENT and not entry.users:
            self._idle[entry.digest] = entry
            self._idle_pages += entry.size

    def _stop_idling(self, entry: Entry) -> None:
        if self._idle.pop(entry.digest, None) is not None:
            self._idle_pages -= entry.size

    def _begin(self, digest: str) -> Entry:
        """Start a load, or raise why its last one failed."""
        now = self._clock()
        backoff = self._backoffs.get(digest)
        if backoff is not None and now < backoff.until:
            raise backoff.error.with_traceback(None)
        size = self._mover.size(digest)
        if size is not None:
            self._check_size(size)
        entry = self._entries[digest] = Entry(digest, since=now)
        if size is None:
            entry.give_up = self._mover.measure(digest)
        else:
            entry.size, entry.state = size, State.MEASURED
        return entry

    def _check_size(self, size: int) -> None:
        """Refuse what could never be brought, lest it is waited for forever."""
        for place, total, remedy in (
            ("device", self._pool.total, "give the runner more memory"),
            ("pinned host", self._host.total, "raise --host-cache-bytes"),
        ):
            if size > total:
                raise InvalidRequest(
                    f"the adapter takes {size} pages and this runner has {total} {place} pages: "
                    f"{remedy}, or use an adapter of a lower rank",
                    reason="ADAPTER_TOO_LARGE",
                )

    def _take(self, event: Event) -> None:
        entry = self._entries[event.digest]
        match event:
            case Measured(pages=pages):
                try:
                    self._check_size(pages)
                    entry.size, entry.state = pages, State.MEASURED
                    entry.given_up = False
                    self._trouble.succeed(State.MEASURING)
                except InvalidRequest as error:
                    self._fail(entry, error)
            case Read():
                entry.state = State.IN_HOST
                self._trouble.succeed(State.READING)
            case Copied():
                self._settle(entry)
            case Failed(error=error):
                if entry.given_up:
                    self._forget(entry)  # who asks for it again begins again
                else:
                    self._fail(entry, error)

    def _settle(self, entry: Entry) -> None:
        """An adapter has reached the device."""
        landed = self._copying.popleft()
        assert landed is entry, "a copy overtook another"
        entry.state = State.RESIDENT
        self._idle_if_unused(entry)
        self._pending.pop(entry.digest, None)
        self._backoffs.pop(entry.digest, None)
        self._loads += 1
        self._resident = None

    def _fail(self, entry: Entry, error: GranatumError) -> None:
        now, digest = self._clock(), entry.digest
        log.warning("adapter load failed", digest=digest, reason=error.reason, error=error.message)
        self._trouble.fail(digest, entry.state, error)
        self._drop_host(entry)
        self._forget(entry)
        self._backoffs = {d: b for d, b in self._backoffs.items() if now < b.forgotten}
        self._backoffs[digest] = Backoff.after(self._backoffs.get(digest), error, now)

    def _advance(self) -> None:
        """Begin reads and copies in the order they were asked for.

        What finds no room holds up the others, or it would be small ones' turn for ever; but not
        past its patience, for it may need all pages of a device that is never idle.
        """
        reads = copies = True
        for entry in tuple(self._pending.values()):
            if entry.state in (State.MEASURED, State.IN_HOST) and not self._is_wanted(entry):
                self._abandon(entry)
            elif entry.state is State.MEASURING:
                self._give_up_if_unwanted(entry)
            elif entry.state is State.MEASURED:
                reads = reads and (self._read(entry) or self._is_impatient(entry))
            elif entry.state is State.IN_HOST:
                copies = copies and (self._copy(entry) or self._is_impatient(entry))

    def _abandon(self, entry: Entry) -> None:
        """Nobody waits for it any more: it stays where it is."""
        del self._pending[entry.digest]
        if entry.state is State.MEASURED:
            self._forget(entry)

    def _give_up_if_unwanted(self, entry: Entry) -> None:
        """End a fetch that nobody waits for: it takes the place of others."""
        if entry.give_up is not None and self._clock() - entry.asked_s > ABANDON_S:
            entry.give_up()
            entry.give_up, entry.given_up = None, True

    def _read(self, entry: Entry) -> bool:
        """Begin to bring an image into host pages; False if there are not enough."""
        if not self._make_host_room(entry.size):
            return False
        pages = self._host.allocate(entry.size)
        assert pages is not None
        entry.host_pages, entry.state = pages, State.READING
        self._hosted[entry.digest] = entry
        self._mover.read(entry.digest, pages)
        return True

    def _copy(self, entry: Entry) -> bool:
        """Begin to copy an image to the device; False if there is no room yet."""
        missing = max(entry.size - self._pool.free_pages, 0)
        slots = 0 if self._free_slots else 1
        if missing or slots:
            impatient = self._is_impatient(entry)
            victims = [e for e in self._idle.values() if impatient or not self._is_wanted(e)]
            if not self._evict(missing, slots, victims):
                return False
        pages = self._pool.allocate(entry.size)
        assert pages is not None
        entry.pages, entry.slot, entry.state = pages, self._free_slots.pop(), State.COPYING
        self._copying.append(entry)
        self._mover.copy(entry.digest, entry.slot, entry.host_pages, pages)
        return True

    def _is_wanted(self, entry: Entry) -> bool:
        """Whether a sequence that waits now, or did a moment ago, asks for it."""
        return entry.asked >= self._round - 1

    def _is_impatient(self, entry: Entry) -> bool:
        return self._clock() - entry.since > PATIENCE_S

    def _evict(self, pages: int, slots: int, victims: list[Entry]) -> int:
        """Take the first of `victims` off the device; pages freed, none if they do not suffice."""
        chosen: list[Entry] = []
        freed = 0
        for victim in victims:
            if freed >= pages and len(chosen) >= slots:
                break
            chosen.append(victim)
            freed += victim.size
        if freed < pages or len(chosen) < slots:
            return 0
        for victim in chosen:
            self._leave_device(victim)
        return freed

    def _leave_device(self, entry: Entry) -> None:
        self._stop_idling(entry)
        self._pool.free(entry.pages)
        self._free_slots.append(entry.slot)
        entry.pages, entry.slot = (), -1
        self._resident = None
        if entry.host_pages:
            entry.state = State.IN_HOST
        else:
            self._forget(entry)

    def _make_host_room(self, pages: int) -> bool:
        """Drop the oldest images that can be spared until `pages` are free."""
        missing = pages - self._host.free_pages
        chosen: list[Entry] = []
        for entry in self._droppable(pages):
            if missing <= 0:
                break
            chosen.append(entry)
            missing -= entry.size
        if missing > 0:
            return False
        for entry in chosen:
            self._drop_host(entry)
            if entry.digest in self._pending:
                entry.state = State.MEASURED
            elif entry.state is State.IN_HOST:
                self._forget(entry)
        return True

    def _droppable(self, pages: int) -> Iterator[Entry]:
        """Images that nobody reads or writes. One that waits to be copied gives way to a smaller
        one, when its patience has ended.
        """
        for entry in self._hosted.values():
            stays = entry.size <= pages or not self._is_impatient(entry)
            if entry.state in (State.IN_HOST, State.RESIDENT) and not (
                stays and entry.digest in self._pending
            ):
                yield entry

    def _drop_host(self, entry: Entry) -> None:
        if entry.host_pages:
            self._host.free(entry.host_pages)
            entry.host_pages = ()
            del self._hosted[entry.digest]

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.digest]
        self._pending.pop(entry.digest, None)
