"""An adapter's way to the device: what is brought next, what waits, and what gives way. No torch.

    object store, local disk ── measure, read ──> host pages ── copy ──> device pages and a slot

The cache decides and `Mover` moves; nothing here blocks. An adapter that runs a sequence never
leaves the device (device_tier.py). The least recently used of the others leave first: the device
for KV or for another adapter, the host pages (host_tier.py) for another image.

The next step may use an adapter before its copy has ended: the device waits for the copy. Mostly
there is no wait, for the copy has as long as the step in flight takes. Only the oldest copy may
delay a step, and only if it is short. A step uses the other copies once they have landed.
"""

import time
from collections.abc import Callable, Iterable

import structlog

from granatum.runner.adapters.backoff import Backoffs
from granatum.runner.adapters.device_tier import DeviceTier
from granatum.runner.adapters.entry import Entry, State
from granatum.runner.adapters.host_tier import HostTier
from granatum.runner.adapters.mover import Copied, Event, Failed, Measured, Mover, Read
from granatum.runner.adapters.residency import AdapterFigures
from granatum.runner.adapters.trouble import LoadTrouble
from granatum.runner.pages import PagePool
from granatum.v1.errors import GranatumError, InvalidRequest

PATIENCE_S = 1.0
"""A load that has waited for longer may displace an adapter that another waiting sequence asks for.
If there is no room even then, the load no longer holds up the loads behind it.
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
        self._mover = mover
        self._clock = clock
        self._device = DeviceTier(pool, slots)
        self._host = HostTier(mover.host_pages)
        self._entries: dict[str, Entry] = {}
        self._pending: dict[str, Entry] = {}  # on their way; the oldest request comes first
        self._backoffs = Backoffs(clock)
        self._trouble = LoadTrouble(clock)
        self._round = 0

    @property
    def figures(self) -> AdapterFigures:
        """What is on the device now."""
        device = self._device
        return AdapterFigures(device.resident, device.loads, device.idle_pages, self._trouble.text)

    def acquire(self, digest: str) -> int | None:
        """Adds a user and returns the adapter's slot.

        Only steps launched after `await_copy` may use the slot. Returns None while the adapter is
        being brought: the first call starts the load, later calls poll. Raises GranatumError if the
        adapter cannot be had; all callers get the same error until the adapter is tried again.
        """
        entry = self._entries.get(digest) or self._begin(digest)
        entry.asked, entry.asked_s = self._round, self._clock()
        self._host.touch(entry)
        if entry.state is not State.RESIDENT and digest not in self._pending:
            entry.since = entry.asked_s
            self._pending[digest] = entry
            self._advance()
        return self._device.acquire(entry) if self._is_usable(entry) else None

    def release(self, digest: str) -> None:
        """One user less; no launched step uses the adapter on this user's behalf."""
        self._device.release(self._entries[digest])

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
        """If the adapter of the oldest copy has a user, the next launch waits for the copy."""
        oldest = self._device.oldest_copy
        if oldest is not None and oldest.users:
            self._mover.fence(oldest.digest)

    def reclaim(self, pages: int) -> int:
        """Free at least `pages` device pages of unused adapters; returns how many were freed.

        Adapters that nobody waits for go first, the oldest use first. Nothing is freed if all of
        them have fewer pages.
        """
        return self._evict(pages, 0, sorted(self._device.idle, key=self._is_wanted))

    def _is_usable(self, entry: Entry) -> bool:
        """Whether the next step may use the adapter."""
        if entry.state is not State.COPYING:
            return entry.state is State.RESIDENT
        return entry is self._device.oldest_copy and entry.size <= self._mover.quick_pages

    def _begin(self, digest: str) -> Entry:
        """Start a load. Raises the error of the last one, if that was a moment ago."""
        self._backoffs.check(digest)
        size = self._mover.size(digest)
        if size is not None:
            self._check_size(size)
        entry = self._entries[digest] = Entry(digest, since=self._clock())
        if size is None:
            entry.give_up = self._mover.measure(digest)
        else:
            entry.size, entry.state = size, State.MEASURED
        return entry

    def _check_size(self, size: int) -> None:
        """Refuse an adapter that can never fit, lest its sequences wait forever."""
        for place, total, remedy in (
            ("device", self._device.total, "give the runner more memory"),
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
                self._measured(entry, pages)
            case Read():
                entry.state = State.IN_HOST
                self._trouble.succeed(State.READING)
            case Copied():
                self._device.land(entry)
                self._pending.pop(entry.digest, None)
                self._backoffs.succeed(entry.digest)
            case Failed(error=error):
                if entry.given_up:
                    self._forget(entry)  # the next request begins a new load
                else:
                    self._fail(entry, error)

    def _measured(self, entry: Entry, pages: int) -> None:
        try:
            self._check_size(pages)
        except InvalidRequest as error:
            self._fail(entry, error)
            return
        entry.size, entry.state, entry.given_up = pages, State.MEASURED, False
        self._trouble.succeed(State.MEASURING)

    def _fail(self, entry: Entry, error: GranatumError) -> None:
        digest = entry.digest
        log.warning("adapter load failed", digest=digest, reason=error.reason, error=error.message)
        self._trouble.fail(digest, entry.state, error)
        self._host.drop(entry)
        self._forget(entry)
        self._backoffs.fail(digest, error)

    def _advance(self) -> None:
        """Begin reads and copies in the order of the requests.

        An adapter without room holds up those behind it, or small adapters would always overtake a
        large one. It does so for PATIENCE_S at most: it may need all pages of a device that is
        never idle.
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
        """Nobody waits for the adapter any more: leave it where it is."""
        del self._pending[entry.digest]
        if entry.state is State.MEASURED:
            self._forget(entry)

    def _give_up_if_unwanted(self, entry: Entry) -> None:
        """End a fetch that nobody waits for: another fetch needs its place."""
        if entry.give_up is not None and self._clock() - entry.asked_s > ABANDON_S:
            entry.give_up()
            entry.give_up, entry.given_up = None, True

    def _read(self, entry: Entry) -> bool:
        """Begin to bring an image into host pages; False if there are not enough."""
        if not self._make_host_room(entry.size):
            return False
        self._host.take(entry)
        entry.state = State.READING
        self._mover.read(entry.digest, entry.host_pages)
        return True

    def _copy(self, entry: Entry) -> bool:
        """Begin to copy an image to the device; False if there is no room yet."""
        pages, slots = self._device.missing(entry.size)
        if pages or slots:
            impatient = self._is_impatient(entry)
            victims = (e for e in self._device.idle if impatient or not self._is_wanted(e))
            if not self._evict(pages, slots, victims):
                return False
        self._device.take(entry)
        self._mover.copy(entry.digest, entry.slot, entry.host_pages, entry.pages)
        return True

    def _is_wanted(self, entry: Entry) -> bool:
        """Whether a waiting sequence has asked for the adapter in this round or the last one."""
        return entry.asked >= self._round - 1

    def _is_impatient(self, entry: Entry) -> bool:
        return self._clock() - entry.since > PATIENCE_S

    def _evict(self, pages: int, slots: int, victims: Iterable[Entry]) -> int:
        """Take the first of `victims` off the device; pages freed, 0 if they do not suffice."""
        evicted = self._device.evict(pages, slots, victims)
        for entry in evicted:
            if not entry.host_pages:
                self._forget(entry)
        return sum(entry.size for entry in evicted)

    def _make_host_room(self, pages: int) -> bool:
        """Drop images until `pages` host pages are free; False if that cannot be."""
        dropped = self._host.make_room(pages, lambda entry: self._can_leave_host(entry, pages))
        if dropped is None:
            return False
        for entry in dropped:
            if entry.digest in self._pending:
                entry.state = State.MEASURED
            elif entry.state is State.IN_HOST:
                self._forget(entry)
        return True

    def _can_leave_host(self, entry: Entry, pages: int) -> bool:
        """Whether the image may give way to one of `pages` pages.

        An image that is being read or copied stays. An image that waits to be copied gives way to
        a smaller one alone, and only when its patience has ended.
        """
        if entry.state not in (State.IN_HOST, State.RESIDENT):
            return False
        if entry.digest not in self._pending:
            return True
        return entry.size > pages and self._is_impatient(entry)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.digest]
        self._pending.pop(entry.digest, None)
