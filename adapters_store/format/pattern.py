"""Regular expressions from strangers: PEFT's own meaning, in bounded time.

PEFT matches with `re`, so only `re` gives the same answers. But `re` backtracks, and it holds the
interpreter meanwhile: a short hostile pattern stops everything else in the process for hours.
Patterns are therefore matched by `pattern_matcher.py` in a process of its own. The operating system
ends this process when its processor time is used up. Most patterns are words and dots; they are
matched here, without `re` and without a process.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from granatum.v1.errors import Unavailable

MAX_LENGTH = 1_000
"""Characters of one pattern."""
MAX_PATTERNS = 2_000
"""Patterns of one field."""
CPU_S = 0.5
"""Processor seconds of one matching. An adapter needs two: its modules, then their ranks."""
_WALL_S = 20.0
"""Seconds to wait for a process. If it is unfinished then, the machine is overloaded."""
_MATCHER = Path(__file__).with_name("pattern_matcher.py")
_REMEMBERED = 64
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_COMPARISONS = 20_000
"""How often plain patterns are compared before a process takes over: some milliseconds."""


class PatternError(ValueError):
    """A pattern is malformed, or takes too long; `field` and `pattern` say which."""

    def __init__(self, field: str, pattern: str, text: str) -> None:
        super().__init__(text)
        self.field = field
        self.pattern = pattern


@dataclass(frozen=True, slots=True)
class Question:
    """Which of a field's patterns is the first to match each name.

    With `whole` a pattern must match the whole name, else the name or its end after a dot.
    """

    field: str
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    whole: bool

    def plain_answer(self) -> list[int | None] | None:
        """Each name's first matching pattern; None if a pattern is not plain, or it takes long."""
        if not all(_PLAIN.fullmatch(pattern) for pattern in self.patterns):
            return None
        plain = _PlainPatterns(self.patterns)
        answer = [plain.first(self._ends(name)) for name in self.names]
        return None if plain.is_spent else answer

    def _ends(self, name: str) -> list[str]:
        """The texts that a pattern may match: the name, and without `whole` its ends as well."""
        if self.whole:
            return [name]
        return [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]


class _PlainPatterns:
    """Patterns of words and dots; a dot stands for any character.

    A pattern that matches a name either equals the name, or is as long and has more dots.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._equal: dict[str, int] = {}
        self._shaped: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for number, pattern in enumerate(patterns):
            if self._equal.setdefault(pattern, number) == number:
                shape = len(pattern), pattern.count(".")
                self._shaped.setdefault(shape, []).append((pattern, number))
        self._left = _COMPARISONS

    @property
    def is_spent(self) -> bool:
        """Whether the comparisons ran out; the answers may then be wrong."""
        return self._left < 0

    def first(self, ends: Sequence[str]) -> int | None:
        """The number of the first pattern that matches any of a name's ends."""
        found = (number for end in ends for number in self._matching(end))
        return min(found, default=None)

    def _matching(self, end: str) -> Iterator[int]:
        if end in self._equal:
            yield self._equal[end]
        for dots in range(end.count(".") + 1, len(end) + 1):
            for pattern, number in self._shaped.get((len(end), dots), ()):
                self._left -= 1
                if self.is_spent:
                    return
                if _fits(pattern, end):
                    yield number


def _fits(pattern: str, text: str) -> bool:
    return all(p in (".", c) for p, c in zip(pattern, text, strict=True))


def ask(questions: Sequence[Question]) -> list[list[int | None]]:
    """For each question, each name's first matching pattern. Blocks. Raises PatternError."""
    plain = [question.plain_answer() for question in questions]
    hard = tuple(q for q, answer in zip(questions, plain, strict=True) if answer is None)
    matched = iter(_match(hard) if hard else ())
    return [next(matched) if answer is None else answer for answer in plain]


# The same trainers write the same patterns, and a runner asks again what an upload asked.
@lru_cache(maxsize=_REMEMBERED)
def _match(questions: tuple[Question, ...]) -> list[list[int | None]]:
    job = {"cpu_s": CPU_S, "questions": [asdict(question) for question in questions]}
    code, lines = _run(json.dumps(job).encode())
    last: list[Any] = json.loads(lines[-1]) if lines else ["nothing"]
    if last[0] == "done":
        return list(last[1])
    if last[0] == "bad":
        raise _error(questions, last[1], last[2], f"is no regular expression ({last[3]})")
    if code == -signal.SIGPROF and last[0] == "at":
        raise _error(questions, last[1], last[2], "takes too long to match: simplify it")
    raise _overloaded()


def _run(job: bytes) -> tuple[int, list[bytes]]:
    """The matcher's exit status, and the lines that it wrote."""
    # -I and -S: neither the environment nor the site may change what it does, or slow its start.
    command = [sys.executable, "-I", "-S", str(_MATCHER)]
    try:
        done = subprocess.run(
            command,
            input=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _overloaded() from error
    return done.returncode, done.stdout.splitlines()


def _overloaded() -> Unavailable:
    return Unavailable(
        "the server is too busy to match this adapter's patterns: try again",
        reason="PATTERNS_NOT_MATCHED",
        retry_after_s=5.0,
    )


def _error(questions: tuple[Question, ...], at: int, pattern: int, text: str) -> PatternError:
    return PatternError(questions[at].field, questions[at].patterns[pattern], text)
