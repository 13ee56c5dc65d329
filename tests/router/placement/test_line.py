"""Whose turn it is among those who wait at one router."""

from contextlib import ExitStack

from granatum.router.placement.line import Line, Waiter
from granatum.router.placement.placement import (
    Capped,
    Limited,
    PlacementRequest,
    Queued,
    Unreachable,
)


def entered(stack: ExitStack, line: Line, entry: str, tenant: str = "", rank: int = 0) -> Waiter:
    request = PlacementRequest(entry, tokens=1, tenant=tenant, rank=rank)
    return stack.enter_context(line.enter(entry, request))


def turns(*waiters: Waiter) -> list[str]:
    """Whose turn it is; they take it."""
    mine = [waiter.entry for waiter in waiters if waiter.turn.is_set()]
    for waiter in waiters:
        waiter.turn.clear()
    return mine


def test_the_first_in_order_tries_and_the_next_when_it_leaves() -> None:
    line = Line()
    with ExitStack() as stack:
        later = entered(stack, line, "2")
        with line.enter("1", PlacementRequest("1", tokens=1)) as first:
            line.call()
            assert turns(first, later) == ["1"]
        assert turns(first, later) == ["2"]
        assert len(line) == 1


def test_who_stands_aside_lets_the_next_of_another_kind_try() -> None:
    line = Line()
    with ExitStack() as stack:
        waiters = [
            entered(stack, line, "1", "a"),
            entered(stack, line, "2", "a"),
            entered(stack, line, "3", "b", rank=64),
            entered(stack, line, "4", "c", rank=64),
            entered(stack, line, "5", "d"),
        ]
        for n, outcome, expected in (
            (0, Capped("1"), "3"),
            (2, Limited("3"), "5"),
            (4, Queued("5", 1), None),
        ):
            waiters[n].note(outcome)
            line.pass_on(waiters[n])
            assert turns(*waiters) == ([expected] if expected else [])
        waiters[0].note(Queued("1", 1))
        line.pass_on(waiters[0])
        assert turns(*waiters) == []


def test_what_a_router_cannot_reach_nobody_of_its_own_tries_after_it() -> None:
    line = Line()
    with ExitStack() as stack:
        first, second = entered(stack, line, "1", "a"), entered(stack, line, "2", "b")
        first.note(Unreachable("1"))
        line.pass_on(first)
        assert turns(first, second) == []
