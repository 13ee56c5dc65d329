"""A mover that only keeps books, and what brings adapters through a cache over it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.mover import Copied, Event, Failed, Measured, Read, abandoned
from granatum.v1.errors import Unavailable


@dataclass
class BookMover:
    """Moves nothing; the test says when what was begun ends. Sizes are given by digest."""

    sizes: dict[str, int]
    host_pages: int = 16
    quick_pages: int = 16
    known: bool = True
    broken: set[str] = field(default_factory=set)
    begun: list[Event] = field(default_factory=list)
    ended: list[Event] = field(default_factory=list)
    writing: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    fences: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    def size(self, digest: str) -> int | None:
        return self.sizes[digest] if self.known else None

    def measure(self, digest: str) -> Callable[[], None]:
        begun = self._end(digest, Measured(digest, self.sizes[digest]))
        self.begun.append(begun)

        def give_up() -> None:
            self.given_up.append(digest)
            if begun in self.begun:
                self.begun[self.begun.index(begun)] = Failed(digest, abandoned())

        return give_up

    def read(self, digest: str, host_pages: tuple[int, ...]) -> None:
        assert len(host_pages) == self.sizes[digest]
        self._hold(digest, host_pages, ())
        self.begun.append(self._end(digest, Read(digest)))

    def copy(
        self, digest: str, slot: int, host_pages: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        assert len(host_pages) == len(pages) == self.sizes[digest]
        self._hold(digest, host_pages, pages)
        self.copies.append(digest)
        self.begun.append(Copied(digest))

    def fence(self, digest: str) -> None:
        assert Copied(digest) in self.begun + self.ended, "there is nothing to wait for"
        self.fences.append(digest)

    def events(self) -> list[Event]:
        ended, self.ended = self.ended, []
        for event in ended:
            self.writing.pop(event.digest, None)
        return ended

    def finish(self, count: int = 1_000_000) -> None:
        """Let the oldest `count` movements end."""
        self.ended += self.begun[:count]
        del self.begun[:count]

    def _end(self, digest: str, event: Event) -> Event:
        error = Unavailable("the object store is away: try again")
        return Failed(digest, error) if digest in self.broken else event

    def _hold(self, digest: str, host: tuple[int, ...], pages: tuple[int, ...]) -> None:
        assert digest not in self.writing
        for other_host, other_pages in self.writing.values():
            assert not set(host) & set(other_host)
            assert not set(pages) & set(other_pages)
        self.writing[digest] = (host, pages)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def settle(cache: AdapterCache, mover: BookMover, rounds: int = 4) -> None:
    for _ in range(rounds):
        mover.finish()
        cache.poll()


def bring(cache: AdapterCache, mover: BookMover, digest: str) -> int:
    """The slot of `digest`, acquired, after as many polls as it takes."""
    for _ in range(6):
        slot = cache.acquire(digest)
        if slot is not None:
            return slot
        mover.finish()
        cache.poll()
    raise AssertionError(f"{digest} never came")
