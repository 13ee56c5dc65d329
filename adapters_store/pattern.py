"""Regular expressions from strangers, matched in bounded time.

`re` backtracks: a short hostile pattern can hold the interpreter for hours. Here the pattern is
parsed by `re` and matched by walking *sets* of positions through it, under a budget of steps; that
gives the same yes or no. Back references and possessive or atomic groups, which mean nothing
without backtracking, are refused.
"""

import re
from collections.abc import Callable, Collection, Iterable
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 1_000
MAX_STEPS = 1_000_000

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
"""Patterns of one length, in which `re` has nothing to backtrack over."""

Positions = frozenset[int]
Node = tuple[Any, Any]


class PatternError(ValueError):
    """The pattern is malformed, uses what cannot be matched safely, or takes too long."""


class Budget:
    """Steps left for matching all patterns of one adapter."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._steps = steps

    def spend(self, steps: int) -> None:
        """Take `steps`; PatternError when none are left."""
        self._steps -= steps
        if self._steps < 0:
            raise PatternError("takes too long to match: simplify it")


class Pattern:
    """A parsed pattern; `text` is what it was parsed from. Raises PatternError."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"is longer than {MAX_LENGTH} characters")
        self.text = text
        try:
            self._nodes = _parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"is no regular expression ({error})") from error
        self._ignore_case = bool(self._nodes.state.flags & re.IGNORECASE)
        self._plain = re.compile(text) if _PLAIN.fullmatch(text) else None

    def matches(self, text: str, starts: Collection[int], budget: Budget) -> bool:
        """Whether a match that begins at one of `starts` ends at the end of `text`."""
        if self._plain is not None:
            budget.spend(1)
            start = len(text) - len(self.text)
            return start in starts and self._plain.fullmatch(text, start) is not None
        walk = _Walk(text, budget)
        try:
            ends = walk.sequence(self._nodes, frozenset(starts), self._ignore_case)
        except RecursionError as error:
            raise PatternError("is nested too deeply") from error
        return len(text) in ends


class _Walk:
    """One text and where in it a pattern may stand."""

    def __init__(self, text: str, budget: Budget) -> None:
        self._text = text
        self._budget = budget

    def sequence(self, nodes: Iterable[Node], at: Positions, ignore_case: bool) -> Positions:
        """Where the nodes, one after another, may end if they begin at any of `at`."""
        for node in nodes:
            if not at:
                break
            self._budget.spend(len(at))
            at = self._node(node, at, ignore_case)
        return at

    def _node(self, node: Node, at: Positions, ignore_case: bool) -> Positions:
        kind, argument = node
        if kind in _CHARACTERS:
            return self._character(_CHARACTERS[kind], argument, at, ignore_case)
        if kind is _constants.AT:
            return frozenset(p for p in at if self._is_at(argument, p))
        if kind is _constants.BRANCH:
            ends = (self.sequence(branch, at, ignore_case) for branch in argument[1])
            return frozenset().union(*ends)
        if kind is _constants.SUBPATTERN:
            _, added, removed, nodes = argument
            ignore_case = bool((ignore_case * re.IGNORECASE | added) & ~removed & re.IGNORECASE)
            return self.sequence(nodes, at, ignore_case)
        if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            low, high, body = argument
            return self._repeat(low, high, body, at, ignore_case)
        if kind in (_constants.ASSERT, _constants.ASSERT_NOT):
            wanted = kind is _constants.ASSERT
            return frozenset(p for p in at if self._looks(argument, p, ignore_case) is wanted)
        raise PatternError(f"uses {str(kind).lower()}, which is not supported")

    def _character(
        self, test: Callable[[Any, str], bool], argument: Any, at: Positions, ignore_case: bool
    ) -> Positions:
        ends = set()
        for position in at:
            if position < len(self._text):
                here = self._text[position]
                cases = {here, here.lower(), here.upper()} if ignore_case else {here}
                # A negated set must hold for every case, any other test for one.
                holds = all if _negated(argument) else any
                if holds(test(argument, case) for case in cases):
                    ends.add(position + 1)
        return frozenset(ends)

    def _repeat(
        self, low: int, high: int, body: Any, at: Positions, ignore_case: bool
    ) -> Positions:
        # Positions never decrease, so after twice the text's length repeating changes nothing more.
        settled = 2 * len(self._text) + 2
        for _ in range(min(low, settled)):
            at = self.sequence(body, at, ignore_case)
        ends = frontier = at
        for _ in range(min(high - low, settled)):
            frontier = self.sequence(body, frontier, ignore_case) - ends
            if not frontier:
                break
            ends |= frontier
        return ends

    def _looks(self, argument: Any, position: int, ignore_case: bool) -> bool:
        direction, nodes = argument
        if direction > 0:
            return bool(self.sequence(nodes, frozenset({position}), ignore_case))
        start = position - nodes.getwidth()[0]
        behind = frozenset({start}) if start >= 0 else frozenset()
        return position in self.sequence(nodes, behind, ignore_case)

    def _is_at(self, place: Any, position: int) -> bool:
        if place in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING):
            return position == 0
        if place in (_constants.AT_END, _constants.AT_END_STRING):
            return position == len(self._text)
        before = position > 0 and _is_word(self._text[position - 1])
        after = position < len(self._text) and _is_word(self._text[position])
        return (before != after) is (place is _constants.AT_BOUNDARY)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _negated(argument: Any) -> bool:
    return isinstance(argument, list) and argument[0][0] is _constants.NEGATE


def _is_in(items: list[Node], character: str) -> bool:
    inside = any(_holds(item, character) for item in items)
    return inside is not _negated(items)


def _holds(item: Node, character: str) -> bool:
    kind, argument = item
    if kind is _constants.LITERAL:
        return bool(ord(character) == argument)
    if kind is _constants.RANGE:
        return bool(argument[0] <= ord(character) <= argument[1])
    return kind is _constants.CATEGORY and _CATEGORIES[argument](character)


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _constants.CATEGORY_DIGIT: str.isdigit,
    _constants.CATEGORY_NOT_DIGIT: lambda c: not c.isdigit(),
    _constants.CATEGORY_SPACE: str.isspace,
    _constants.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    _constants.CATEGORY_WORD: _is_word,
    _constants.CATEGORY_NOT_WORD: lambda c: not _is_word(c),
}
_CHARACTERS: dict[Any, Callable[[Any, str], bool]] = {
    _constants.LITERAL: lambda code, c: bool(ord(c) == code),
    _constants.NOT_LITERAL: lambda code, c: bool(ord(c) != code),
    _constants.ANY: lambda _, c: c != "\n",
    _constants.IN: _is_in,
}
