"""Chat templates that adapters bring: programs of tenants, run in processes that may be killed.

A server process (`server.py`) imports what templates need, once. For each chat it forks a
process with little processor time and memory, which renders the template and ends.
"""

import json
import os
import select
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

from granatum.runner.text.templates.applied import TemplateFailed
from granatum.v1.conversation import Conversation
from granatum.v1.errors import Unavailable

_WALL_S = 30.0
"""The longest wait for an answer. The first one waits until the server has imported."""
_SERVER = "granatum.runner.text.templates.server"
_PASSED_ON = ("PATH", "PYTHONPATH", "HOME", "LANG", "TZ")
"""All that a tenant's template could see of the environment: no key is in it."""


class ForeignTemplates:
    """Renders templates of adapters, one at a time. Blocks; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None

    def render(self, template: str, conversation: Conversation, special: dict[str, Any]) -> str:
        """The text that `template` makes; `special` are variables for special tokens.

        Raises TemplateFailed, or Unavailable if the server does not answer.
        """
        job = {"template": template, "special": special, "conversation": asdict(conversation)}
        with self._lock:
            answer = self._ask(json.dumps(job).encode())
        if "text" not in answer:
            raise TemplateFailed(answer["failed"], answer.get("said", ""))
        return str(answer["text"])

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def _ask(self, job: bytes) -> dict[str, Any]:
        try:
            server = self._server  # `close` may come at any time
            if server is None or server.poll() is not None:
                server = self._server = _started()
            assert server.stdin is not None
            server.stdin.write(job + b"\n")
            server.stdin.flush()
            answer: dict[str, Any] = json.loads(_line(server))
        except (OSError, ValueError) as error:
            self.close()
            raise Unavailable(
                "the runner is too busy to render this adapter's chat template: try again",
                reason="TEMPLATE_NOT_RENDERED",
                retry_after_s=5.0,
            ) from error
        return answer


def _started() -> "subprocess.Popen[bytes]":
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def _line(server: "subprocess.Popen[bytes]") -> bytes:
    """The server's next line. Raises TimeoutError (an OSError) if none comes."""
    assert server.stdout is not None
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        if not select.select([server.stdout], [], [], _WALL_S)[0]:
            raise TimeoutError
        parts.append(os.read(server.stdout.fileno(), 1 << 16))
        if not parts[-1]:
            raise BrokenPipeError
    return b"".join(parts)
