"""A program that matches patterns for pattern.py and may be ended at any moment.

It reads a job in JSON and writes lines of JSON: ["at", question, pattern] before each pattern, then
["done", answers], or ["bad", question, pattern, reason] for a pattern that is none. It imports the
standard library alone, so that it starts in milliseconds.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

_MEMORY_BYTES = 512 << 20
_PATIENCE = 10  # others' tokens come first


def main() -> None:
    """Answer the job on the standard input."""
    job = json.load(sys.stdin)
    _limit(job["cpu_s"])
    answers = [_answer(at, question) for at, question in enumerate(job["questions"])]
    _say("done", answers)


def _limit(cpu_s: float) -> None:
    os.nice(_PATIENCE)
    with suppress(ValueError, OSError):  # not every system has it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _answer(at: int, question: dict[str, object]) -> list[int | None]:
    """Each name's first matching pattern."""
    names, patterns = question["names"], question["patterns"]
    assert isinstance(names, list)
    assert isinstance(patterns, list)
    left = dict(enumerate(names))
    found: list[int | None] = [None] * len(names)
    for number, text in enumerate(patterns):
        _say("at", at, number)
        matches = _compiled(at, number, text, whole=bool(question["whole"]))
        for place in [place for place, name in left.items() if matches(name)]:
            found[place] = number
            del left[place]
    return found


def _compiled(
    at: int, number: int, text: str, *, whole: bool
) -> Callable[[str], re.Match[str] | None]:
    """How PEFT matches: target_modules the whole name, rank_pattern the end of it."""
    try:
        if whole:
            return re.compile(text).fullmatch
        return re.compile(rf"(.*\.)?({text})$").match
    except re.error as error:
        _say("bad", at, number, error.msg)
    except (OverflowError, RecursionError, MemoryError):
        _say("bad", at, number, "it is nested too deeply, or too large")
    sys.exit(1)


def _say(*line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
