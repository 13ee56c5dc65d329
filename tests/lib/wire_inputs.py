"""A call as a stranger may send it, and values that break careless readers."""

import math
from dataclasses import dataclass

NAN, INF = math.nan, math.inf
ODD_TEXTS = (
    "\0", "\n", "\ufeff", "\uffff", "\u202e", "é" * 7, "👩‍👩‍👧‍👦", "\U0010ffff", "a\u0300" * 9,
    "<s>", "</s>", "<pad>", "%s%n", "../../etc/passwd", "{{7*7}}", "'; DROP TABLE x;--", "sha256:",
    "sha256:" + "0" * 64, "acme/x@1", "@", "/", "x@0", "x@99999999999", "name@1@2",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One call: the method's path, its messages on the wire, and what is wrong with it."""

    method: str
    messages: tuple[bytes, ...]
    wrong: frozenset[str] | None = frozenset()
    """The fields of which one must be named; empty: nothing is wrong; None: who knows."""
    as_admin: bool = False

    def __repr__(self) -> str:
        sizes = [len(message) for message in self.messages]
        shown = [message[:200] for message in self.messages[:2]]
        return f"Input({self.method}, wrong={self.wrong}, sizes={sizes[:5]}, {shown})"
