"""A child process that ends when we do, with its output in a log file."""

import asyncio
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

_POLL_S = 0.05
_TAIL_LINES = 20

# Runs in the child, before it becomes what it shall be: the kernel sends it SIGTERM when we die,
# however we die. A parent that died before that is noticed by hand.
_LEASH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


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
        """Start the child; its log goes on from where it was."""
        leash = (sys.executable, "-ISc", _LEASH, str(os.getpid()))
        with self.log.open("ab") as log:
            self._begin = log.tell()
            self._child = await asyncio.create_subprocess_exec(
                *leash,
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
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
        """The child's exit status, once it has ended."""
        assert self._child is not None
        return await self._child.wait()

    async def logged(self, text: str) -> str:
        """The first log line since the start that contains `text`, once it is there."""
        while True:
            complete, _, _ = self.log.read_bytes()[self._begin :].rpartition(b"\n")
            for line in complete.decode(errors="replace").splitlines():
                if text in line:
                    return line
            await asyncio.sleep(_POLL_S)

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
        """The last lines of the log."""
        with self.log.open(errors="replace") as log:
            return "".join(deque(log, _TAIL_LINES)).rstrip()
