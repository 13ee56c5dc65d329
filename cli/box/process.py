"""A child process that ends when we do, with its output in a log file.

Only the user who started a child can read its files, the log included.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from granatum.v1.errors import Unavailable

_OURS_ALONE = 0o077
"""The umask of our children: files that others cannot read."""
_POLL_S = 0.05
_TAIL_BYTES = 64 << 10
_TAIL_LINES = 20
_TAIL_COLUMNS = 500
_LONGEST_LINE = 1 << 20

# This runs in the child before the child becomes its program. It asks the kernel to send the child
# SIGTERM when we die. If we died before that, the child's parent has changed, and the child ends.
_LEASH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProcessDied(Unavailable):
    """A process ended by itself; the message's last line is the cause, if its log says one."""


class Process:
    """One child. It leads its own process group: the terminal's Ctrl-C reaches us alone."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = {**os.environ, **(env or {})}
        self._begin = 0
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the child, which appends to its log. Raises Unavailable if it cannot start."""
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._begin = os.fstat(log).st_size
                self._child = await self._spawn(log)
            finally:
                os.close(log)
        except OSError as error:
            raise Unavailable(f"{self.name} cannot start: {error}") from error

    async def _spawn(self, log: int) -> asyncio.subprocess.Process:
        leash = (sys.executable, "-ISc", _LEASH, str(os.getpid()))
        return await asyncio.create_subprocess_exec(
            *leash,
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
            umask=_OURS_ALONE,
        )

    @property
    def running(self) -> bool:
        """Whether the child was started and has not ended."""
        return self._child is not None and self._child.returncode is None

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._child is not None
        return self._child.pid

    async def wait(self) -> int:
        """Wait for the child's end; return its exit status."""
        assert self._child is not None
        return await self._child.wait()

    async def death(self) -> ProcessDied:
        """Wait for the child's end; return how it ended and what its log says of that."""
        status = await self.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        cause = self._cause() if status > 0 else None
        if cause is not None:
            return ProcessDied(f"{self.name} ended {how}, see {self.log}:\n{cause}")
        return ProcessDied(f"{self.name} ended {how}; the end of {self.log}:\n{self.tail()}")

    async def logged(self, text: str) -> str:
        """Wait for the first log line since the start that contains `text`; return it."""
        with self.log.open("rb") as log:
            log.seek(self._begin)
            line = b""
            while True:
                part = log.readline(_LONGEST_LINE)
                line += part
                if not part:
                    await asyncio.sleep(_POLL_S)
                elif line.endswith(b"\n") or len(line) >= _LONGEST_LINE:
                    said = line.decode(errors="replace").rstrip("\r\n")
                    if text in said:
                        return said
                    line = b""

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL if it takes longer than `grace_s`."""
        if self._child is None or not self.running:
            return
        self._child.terminate()
        try:
            await asyncio.wait_for(self._child.wait(), grace_s)
        except TimeoutError:
            self._child.kill()
            await self._child.wait()

    def tail(self) -> str:
        """The last lines since the start, fit for a terminal."""
        return "\n".join(_printable(line) for line in self._last_lines()[-_TAIL_LINES:])

    def _cause(self) -> str | None:
        """Why the child could not serve, which our programs log last of all."""
        complaints = map(_complaint, reversed(self._last_lines()))
        return next((_printable(text) for text in complaints if text), None)

    def _last_lines(self) -> list[str]:
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._begin, end - _TAIL_BYTES))
                return log.read(_TAIL_BYTES).decode(errors="replace").splitlines()
        except OSError as error:
            return [f"(the log cannot be read: {error.strerror})"]


def _complaint(line: str) -> str:
    """The error that a line of a JSON log carries; empty if it carries none."""
    try:
        said = json.loads(line) if line.startswith("{") else {}
    except (ValueError, RecursionError):
        return ""
    wrong = said.get("wrong")
    return str(said.get("error") or ("; ".join(map(str, wrong)) if isinstance(wrong, list) else ""))


def _printable(line: str) -> str:
    """A line that moves no terminal's cursor and is not too long."""
    cut = line if len(line) <= _TAIL_COLUMNS else f"{line[:_TAIL_COLUMNS]} ..."
    return "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in cut)
