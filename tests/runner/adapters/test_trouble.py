"""What failed and successful loads tell of a runner."""

import pytest

from granatum.runner.adapters.trouble import TROUBLE_S, LoadTrouble
from granatum.v1.errors import InvalidAdapter, NotFound, Unavailable

AWAY = Unavailable("the store is away", reason="STORE_AWAY")
FULL = Unavailable("the disk is full", reason="ADAPTER_DISK_FULL")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trouble(clock: Clock) -> LoadTrouble:
    return LoadTrouble(clock)


def test_one_adapter_that_fails_again_and_again_tells_nothing(trouble: LoadTrouble) -> None:
    for _ in range(9):
        trouble.fail("a", "fetch", AWAY)
    assert trouble.text == ""


def test_two_in_a_row_tell_and_a_success_clears(trouble: LoadTrouble) -> None:
    for digest in "ab":
        trouble.fail(digest, "fetch", AWAY)
    assert trouble.text == "STORE_AWAY: the store is away"
    trouble.succeed("fetch")
    assert trouble.text == ""
    trouble.fail("c", "fetch", AWAY)
    assert trouble.text == "", "not in a row"


def test_a_full_disk_tells_at_once(trouble: LoadTrouble) -> None:
    trouble.fail("a", "fetch", FULL)
    assert trouble.text == "ADAPTER_DISK_FULL: the disk is full"


def test_bad_adapters_tell_nothing(trouble: LoadTrouble) -> None:
    for digest in "abcd":
        trouble.fail(digest, "fetch", InvalidAdapter("NaN"))
    assert trouble.text == ""


def test_a_store_that_has_none_of_the_adapters_is_the_wrong_one(trouble: LoadTrouble) -> None:
    for digest in "ab":
        trouble.fail(digest, "fetch", NotFound("the store has none"))
    assert trouble.text == "NOT_FOUND: the store has none"


def test_reads_from_the_disk_do_not_hide_a_store_that_is_away(trouble: LoadTrouble) -> None:
    for digest in "ab":
        trouble.fail(digest, "fetch", AWAY)
        trouble.succeed("read")
    assert trouble.text


def test_trouble_is_forgotten_so_that_the_runner_is_tried_again(
    trouble: LoadTrouble, clock: Clock
) -> None:
    for digest in "ab":
        trouble.fail(digest, "fetch", AWAY)
    clock.now = TROUBLE_S
    assert trouble.text == ""
    trouble.fail("c", "fetch", AWAY)
    assert trouble.text == "", "it begins anew"
    trouble.fail("d", "fetch", AWAY)
    assert trouble.text
