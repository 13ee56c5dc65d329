"""Fetches beside each other: some hang, some crawl, and nobody waits for somebody else's."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from small_adapters import write_adapter

from granatum.adapters_store.blobs.blobs import Blobs
from granatum.adapters_store.blobs.incoming import adapter_digest
from granatum.adapters_store.objects.objects import Objects
from granatum.runner.adapters.disk.fetching import Fetches
from granatum.v1.errors import NotFound, Unavailable


class Slow(Objects):
    """Objects of which the keys with `hung` never come, and the others in `parts` slow steps."""

    def __init__(self, parts: int = 1, pause_s: float = 0.0) -> None:
        super().__init__(MemoryStore())
        self.hung: set[str] = set()
        self.parts, self.pause_s = parts, pause_s
        self.waiting: list[str] = []
        self.cancelled: list[str] = []

    async def read_range(self, key: str, begin: int, end: int) -> bytes | None:
        if self.hung & set(key.split("/")):
            await self._hang(key)
        for _ in range(self.parts):
            await asyncio.sleep(self.pause_s)
            self.arrived()
        return await super().read_range(key, begin, end)

    async def _hang(self, key: str) -> None:
        self.waiting.append(key)
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.append(key)


def objects_with(tmp_path: Path, count: int, slow: Slow) -> list[str]:
    """Digests of adapters that were put into the store."""
    digests = []
    for number in range(count):
        directory = tmp_path / f"adapter-{number}"
        write_adapter(directory, number, 8, ["q_proj"])
        files = [directory / "adapter_config.json", directory / "adapter_model.safetensors"]
        digest = adapter_digest(*(hashlib.sha256(f.read_bytes()).digest() for f in files))
        asyncio.run(Blobs(slow).put(digest, files, 0))
        digests.append(digest)
    return digests


def test_hung_fetches_keep_nobody_waiting_and_end_by_themselves(tmp_path: Path) -> None:
    slow = Slow()
    *hung, last = objects_with(tmp_path, 33, slow)
    slow.hung.update(hung)
    fetches = Fetches(slow, fetch_s=60, stall_s=2)
    with ThreadPoolExecutor(len(hung)) as threads:
        futures = [threads.submit(fetches.fetch, digest, tmp_path / "hung") for digest in hung]
        until(lambda: len({*slow.waiting}) >= len(hung))
        files = fetches.fetch(last, tmp_path / "well")
        assert (files / "adapter_model.safetensors").is_file()
        assert not any(future.done() for future in futures)
        for future in futures:
            error = future.exception(20)
            assert isinstance(error, Unavailable)
            assert error.reason == "ADAPTER_LOAD_STALLED"
    assert sorted(slow.cancelled) == sorted(slow.waiting), "what is given up is cancelled"


def until(condition: Callable[[], bool], patience_s: float = 20) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_slow_fetch_is_no_stalled_one(tmp_path: Path) -> None:
    slow = Slow(parts=8, pause_s=0.1)
    (digest,) = objects_with(tmp_path, 1, slow)
    began = time.monotonic()
    Fetches(slow, fetch_s=60, stall_s=0.5).fetch(digest, tmp_path / "slow")
    assert time.monotonic() - began > 0.5


def test_a_fetch_that_only_just_goes_on_ends_some_time(tmp_path: Path) -> None:
    slow = Slow(parts=1_000_000, pause_s=0.01)
    (digest,) = objects_with(tmp_path, 1, slow)
    with pytest.raises(Unavailable) as refused:
        Fetches(slow, fetch_s=0.3, stall_s=60).fetch(digest, tmp_path / "slow")
    assert refused.value.reason == "ADAPTER_LOAD_STALLED"


def test_a_fetch_that_is_given_up_ends_at_once_and_can_be_had_again(tmp_path: Path) -> None:
    slow = Slow()
    (digest,) = objects_with(tmp_path, 1, slow)
    slow.hung.add(digest)
    fetches = Fetches(slow)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(fetches.fetch, digest, tmp_path / "hung")
        until(lambda: bool(slow.waiting))
        fetches.abandon(digest)
        error = future.exception(5)
    assert isinstance(error, Unavailable)
    assert error.reason == "ADAPTER_LOAD_ABANDONED"
    until(lambda: bool(slow.cancelled))
    slow.hung.clear()
    assert fetches.fetch(digest, tmp_path / "well").is_dir()
    fetches.abandon(digest)  # nothing is under way: nothing happens


def test_what_the_store_says_comes_through(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Fetches(Slow()).fetch("ab" * 32, tmp_path)


def test_objects_tell_of_every_part_that_comes(tmp_path: Path) -> None:
    objects, parts = Objects(MemoryStore()), []
    data = bytes(range(256)) * (5 << 12)
    asyncio.run(objects.put("key", data))
    watched = objects.watched(lambda: parts.append(1))
    assert asyncio.run(watched.read_range("key", 100, len(data))) == data[100:]
    assert parts
    assert asyncio.run(objects.read_range("key", 0, 3)) == data[:3]
    assert asyncio.run(watched.read_range("nothing", 0, 3)) is None
