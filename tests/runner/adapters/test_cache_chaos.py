"""The adapter cache under random users: its books balance after every operation."""

import random

import pytest
from book_mover import BookMover, Clock, bring, settle

from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.pages import PagePool
from granatum.v1.errors import GranatumError


class Chaos:
    """Random users of one cache; after every operation the books must balance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.digests = [f"{i:02}" for i in range(24)]
        sizes = {digest: self.random.randint(1, 5) for digest in self.digests}
        self.mover = BookMover(sizes, host_pages=20, known=False)
        self.pool = PagePool(24)
        self.clock = Clock()
        self.cache = AdapterCache(self.pool, self.mover, slots=5, clock=self.clock)
        self.users: list[str] = []
        self.kv: list[tuple[int, ...]] = []
        self.slots: dict[str, int] = {}

    def step(self) -> None:
        self.clock.now += self.random.random() * 0.3
        choice = self.random.choice
        choice((self.acquire, self.acquire, self.release, self.poll, self.grow, self.shrink))()
        self.check()

    def acquire(self) -> None:
        digest = self.random.choice(self.digests)
        try:
            slot = self.cache.acquire(digest)
        except GranatumError:
            return
        if slot is not None:
            assert self.slots.setdefault(digest, slot) == slot
            self.users.append(digest)

    def release(self) -> None:
        if self.users:
            digest = self.users.pop(self.random.randrange(len(self.users)))
            self.cache.release(digest)
            if digest not in self.users:
                del self.slots[digest]

    def poll(self) -> None:
        for digest in self.digests:
            (self.mover.broken.add if self.random.random() < 0.1 else self.mover.broken.discard)(
                digest
            )
        self.mover.finish(self.random.randint(0, 3))
        self.cache.poll()

    def grow(self) -> None:
        count = self.random.randint(1, 6)
        pages = self.pool.allocate(count)
        if pages is None:
            before = self.pool.free_pages
            assert self.cache.reclaim(count) == self.pool.free_pages - before
            pages = self.pool.allocate(count)
        if pages:
            self.kv.append(pages)

    def shrink(self) -> None:
        if self.kv:
            self.pool.free(self.kv.pop(self.random.randrange(len(self.kv))))

    def check(self) -> None:
        entries = self.cache._entries.values()
        on_device = {entry.digest for entry in entries if entry.pages}
        assert set(self.users) <= on_device, "an adapter in use has left"
        assert set(self.cache.figures.resident) <= on_device
        idle = [entry.size for entry in self.cache._device.idle]
        assert self.cache.figures.reclaimable_pages == sum(idle)
        assert len(set(self.slots.values())) == len(self.slots), "two adapters share a slot"
        held = [page for entry in entries for page in entry.pages]
        held += [page for pages in self.kv for page in pages]
        assert len(held) == len(set(held)), "a page has two owners"
        assert len(held) + self.pool.free_pages == self.pool.total
        host = [page for entry in entries for page in entry.host_pages]
        assert len(host) == len(set(host))
        assert len(host) + self.cache._host.free_pages == self.mover.host_pages
        slots = [entry.slot for entry in entries if entry.pages]
        assert sorted(slots + self.cache._device._free_slots) == list(range(5))

    def wind_down(self) -> None:
        """Everybody leaves; nothing may remain but idle adapters, and all of them can go."""
        while self.users:
            self.release()
        while self.kv:
            self.shrink()
        settle(self.cache, self.mover, rounds=6)
        self.cache.reclaim(self.cache.figures.reclaimable_pages)
        assert self.pool.free_pages == self.pool.total
        assert self.cache.figures.resident == ()


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_random_operations_leak_nothing(seed: int) -> None:
    chaos = Chaos(seed)
    for _ in range(10_000):
        chaos.step()
    assert chaos.cache.figures.loads > 300
    chaos.wind_down()


def test_every_adapter_can_still_be_had_after_chaos() -> None:
    chaos = Chaos(99)
    for _ in range(2_000):
        chaos.step()
    chaos.wind_down()
    chaos.mover.broken.clear()
    chaos.clock.now += 1_000
    for digest in chaos.digests:
        bring(chaos.cache, chaos.mover, digest)
        chaos.cache.release(digest)
