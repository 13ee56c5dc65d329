"""The adapter cache against a mover that only keeps books."""

import pytest
from book_mover import BookMover, Clock, bring, settle

from granatum.runner.adapters.backoff import BACKOFF_S
from granatum.runner.adapters.cache import ABANDON_S, PATIENCE_S, AdapterCache
from granatum.runner.adapters.mover import Copied, Measured
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.engine.scheduling.scheduler import Scheduler
from granatum.runner.pages import PagePool
from granatum.runner.records import Submit
from granatum.v1.errors import InvalidRequest, Unavailable


def test_first_use_goes_through_every_tier() -> None:
    mover = BookMover({"a": 3}, known=False)
    cache = AdapterCache(PagePool(8), mover, slots=2, clock=Clock())
    assert cache.acquire("a") is None
    assert mover.begun == [Measured("a", 3)]
    assert bring(cache, mover, "a") in (0, 1)
    settle(cache, mover)
    assert cache.figures.resident == ("a",)
    assert (cache.figures.loads, cache.figures.reclaimable_pages) == (1, 0)
    cache.release("a")
    assert cache.figures.reclaimable_pages == 3


def in_host_memory(*digests: str) -> tuple[AdapterCache, BookMover]:
    """Adapters of two pages each that have been on the device and left it."""
    mover = BookMover(dict.fromkeys(digests, 2))
    cache = AdapterCache(PagePool(2 * len(digests)), mover, len(digests), clock=Clock())
    for digest in digests:
        bring(cache, mover, digest)
        cache.release(digest)
    settle(cache, mover)
    assert cache.reclaim(2 * len(digests)) == 2 * len(digests)
    mover.copies.clear()
    mover.fences.clear()
    return cache, mover


def test_adapter_in_host_memory_is_had_at_once_behind_its_copy() -> None:
    cache, mover = in_host_memory("a")
    assert cache.acquire("a") == 0
    assert mover.begun == [Copied("a")]
    cache.await_copy()
    assert mover.fences == ["a"]
    settle(cache, mover)
    assert cache.acquire("a") == 0
    cache.await_copy()
    assert mover.fences == ["a"], "what has landed is not waited for"


def test_copy_of_an_adapter_that_the_next_step_does_without_is_not_waited_for() -> None:
    cache, mover = in_host_memory("a")
    cache.acquire("a")
    cache.release("a")
    cache.await_copy()
    assert not mover.fences


def test_image_that_was_read_is_had_in_the_same_round() -> None:
    mover = BookMover({"a": 3})
    cache = AdapterCache(PagePool(8), mover, slots=2, clock=Clock())
    assert cache.acquire("a") is None
    mover.finish()
    cache.poll()
    assert cache.acquire("a") is not None
    cache.await_copy()
    assert mover.fences == ["a"]


def test_steps_wait_for_one_copy_at_most() -> None:
    cache, mover = in_host_memory("a", "b", "c")
    assert [cache.acquire(digest) is None for digest in "abc"] == [False, True, True]
    cache.await_copy()
    mover.finish(1)
    cache.poll()
    assert [cache.acquire(digest) is None for digest in "abc"] == [False, False, True]
    cache.await_copy()
    assert mover.fences == ["a", "b"]
    mover.finish()
    cache.poll()
    assert cache.acquire("c") is not None
    cache.await_copy()
    assert mover.fences == ["a", "b"]


def test_steps_wait_for_no_copy_that_takes_long() -> None:
    cache, mover = in_host_memory("a")
    mover.quick_pages = 1
    assert cache.acquire("a") is None
    settle(cache, mover)
    assert cache.acquire("a") is not None
    cache.await_copy()
    assert not mover.fences


def test_adapter_given_back_before_it_has_landed_leaves_only_afterwards() -> None:
    cache, mover = in_host_memory("a")
    cache.acquire("a")
    cache.release("a")
    assert cache.reclaim(1) == cache.figures.reclaimable_pages == 0
    settle(cache, mover)
    assert cache.figures.reclaimable_pages == 2
    assert cache.reclaim(1) == 2


@pytest.mark.parametrize("cold", [False, True])
def test_scheduled_next_from_the_device_or_from_host_memory_alike(cold: bool) -> None:
    mover, pool = BookMover({"a": 2}), PagePool(8)
    cache = AdapterCache(pool, mover, slots=1, clock=Clock())
    bring(cache, mover, "a")
    cache.release("a")
    settle(cache, mover)
    if cold:
        cache.reclaim(2)
    scheduler = Scheduler(EngineLimits(4, 4, 16, 4, 64), pool, cache)
    scheduler.submit(Submit(1, (1, 2, 3), adapter="a", max_tokens=4))
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.rows, chunk.sequence.slot) == (3, 0)
    assert mover.begun == [Copied("a")] * cold, "the step waits on the device, not here"


def test_pages_of_adapters_in_use_are_never_reclaimed() -> None:
    mover = BookMover({"a": 3, "b": 3})
    pool = PagePool(8)
    cache = AdapterCache(pool, mover, slots=2, clock=Clock())
    bring(cache, mover, "a")
    bring(cache, mover, "b")
    settle(cache, mover)
    assert cache.reclaim(1) == 0
    cache.release("a")
    assert cache.reclaim(4) == 0, "nothing is evicted in vain"
    assert cache.reclaim(2) == 3
    assert (cache.figures.resident, pool.free_pages) == (("b",), 5)


def test_least_recently_used_leaves_first_but_not_one_that_is_waited_for() -> None:
    mover = BookMover({"a": 2, "b": 2, "c": 2})
    cache = AdapterCache(PagePool(6), mover, slots=3, clock=Clock())
    for digest in "abc":
        bring(cache, mover, digest)
    for digest in "bca":
        cache.release(digest)
    settle(cache, mover)
    cache.acquire("b")
    cache.release("b")
    cache.acquire("c")
    cache.release("c")
    assert cache.reclaim(1) == 2
    assert cache.figures.resident == ("b", "c")
    assert cache.reclaim(1) == 2
    assert cache.figures.resident == ("c",)


def test_a_load_does_not_displace_what_another_waits_for_until_patience_ends() -> None:
    mover, clock = BookMover({"a": 4, "b": 4}), Clock()
    cache = AdapterCache(PagePool(4), mover, slots=1, clock=clock)
    for _ in range(8):  # a was first, and nobody takes it: b must wait
        for digest in "ab":
            if cache.acquire(digest) is not None:
                cache.release(digest)
        mover.finish()
        cache.poll()
    assert cache.figures.resident == ("a",)
    clock.now += 2 * PATIENCE_S
    cache.acquire("b")
    cache.poll()
    assert cache.figures.resident == ()
    settle(cache, mover)
    assert cache.figures.resident == ("b",)


@pytest.mark.parametrize("host_pages", [16, 6])
def test_an_adapter_for_which_there_is_no_room_holds_up_others_for_a_moment_only(
    host_pages: int,
) -> None:
    """Sequences hold half of the device for good; host memory has room for all, or for the one."""
    mover, clock, pool = BookMover({"large": 6, "small": 2}, host_pages), Clock(), PagePool(8)
    cache = AdapterCache(pool, mover, slots=4, clock=clock)
    kv = pool.allocate(4) or ()
    slot, waited_s = None, 0.0
    while slot is None:
        assert cache.acquire("large") is None
        slot = cache.acquire("small")
        clock.now += 0.25
        waited_s += 0.25
        settle(cache, mover, rounds=1)
        assert waited_s <= 2 * PATIENCE_S, "the large one holds up the small one"
    assert waited_s > PATIENCE_S, "the large one has had no turn"
    cache.release("small")
    pool.free(kv)
    clock.now += 0.25
    assert bring(cache, mover, "large") >= 0


def test_a_load_that_nobody_waits_for_any_more_stays_in_host_memory() -> None:
    mover = BookMover({"a": 4})
    cache = AdapterCache(PagePool(4), mover, slots=1, clock=Clock())
    cache.acquire("a")
    for _ in range(3):
        cache.poll()
    settle(cache, mover)
    assert cache.figures.resident == ()
    assert mover.copies == []
    cache.acquire("a")
    assert mover.copies == ["a"]


def test_failure_reaches_everybody_and_is_retried_after_a_pause() -> None:
    mover, clock = BookMover({"a": 1}, known=False, broken={"a"}), Clock()
    cache = AdapterCache(PagePool(4), mover, slots=1, clock=clock)
    cache.acquire("a")
    settle(cache, mover)
    for _ in range(2):
        with pytest.raises(Unavailable, match="object store"):
            cache.acquire("a")
    clock.now += BACKOFF_S
    assert cache.acquire("a") is None
    settle(cache, mover)
    clock.now += BACKOFF_S
    with pytest.raises(Unavailable):
        cache.acquire("a")  # the pause has doubled
    clock.now += BACKOFF_S
    mover.broken.clear()
    assert bring(cache, mover, "a") == 0


def test_a_fetch_that_nobody_waits_for_is_given_up_and_begun_again_when_asked_for() -> None:
    mover, clock = BookMover({"a": 1, "b": 1}, known=False), Clock()
    cache = AdapterCache(PagePool(4), mover, slots=2, clock=clock)
    for digest in "ab":
        cache.acquire(digest)
    for _ in range(4):
        clock.now += ABANDON_S / 2
        assert cache.acquire("b") is None
        cache.poll()
    assert mover.given_up == ["a"], "b is waited for all the time, and a is given up once"
    assert cache.acquire("a") is None
    settle(cache, mover)
    assert cache.figures.trouble == ""
    assert bring(cache, mover, "a") in (0, 1), "nobody is kept from it"
    assert bring(cache, mover, "b") in (0, 1)


def test_what_was_given_up_too_late_is_taken_all_the_same() -> None:
    mover, clock = BookMover({"a": 1}, known=False), Clock()
    cache = AdapterCache(PagePool(4), mover, slots=2, clock=clock)
    cache.acquire("a")
    mover.finish()
    clock.now += 2 * ABANDON_S
    cache._advance()
    assert mover.given_up == ["a"]
    cache.acquire("a")
    mover.broken.add("a")
    settle(cache, mover)
    with pytest.raises(Unavailable):
        cache.acquire("a")
    assert cache._host.free_pages == mover.host_pages
    mover.broken.clear()
    clock.now += BACKOFF_S
    assert bring(cache, mover, "a") == 0


def test_a_runner_that_cannot_load_says_so_until_it_can() -> None:
    mover, clock = BookMover(dict.fromkeys("abc", 1), known=False, broken={*"ab"}), Clock()
    cache = AdapterCache(PagePool(4), mover, slots=2, clock=clock)
    for digest, told in (("a", False), ("b", True)):
        cache.acquire(digest)
        settle(cache, mover)
        assert bool(cache.figures.trouble) is told
    assert "object store" in cache.figures.trouble
    bring(cache, mover, "c")
    assert cache.figures.trouble == ""


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("pages", "host", "message"), [(4, 99, "device"), (99, 4, "host")])
def test_adapter_that_never_fits_is_refused(
    known: bool, pages: int, host: int, message: str
) -> None:
    mover = BookMover({"a": 5}, host_pages=host, known=known)
    cache = AdapterCache(PagePool(pages), mover, slots=1, clock=Clock())
    with pytest.raises(InvalidRequest, match=message):
        bring(cache, mover, "a")


def test_host_pages_of_the_least_recently_asked_for_give_way() -> None:
    mover = BookMover({"a": 2, "b": 2, "c": 2}, host_pages=4)
    cache = AdapterCache(PagePool(99), mover, slots=3, clock=Clock())
    for digest in "abc":
        bring(cache, mover, digest)
        cache.release(digest)
    settle(cache, mover)
    assert cache.reclaim(6) == 6
    mover.copies.clear()
    assert cache.acquire("b") is not None
    assert mover.copies == ["b"], "b is still in host memory"
    assert cache.acquire("a") is None
    assert mover.copies == ["b"], "a gave its host pages to c and is read again"
