"""Fetches adapters' files from the object store, all of them on one event loop."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path

import structlog

from granatum.adapters_store.blobs.blobs import Blobs
from granatum.adapters_store.objects.objects import Objects
from granatum.runner.adapters.mover import abandoned
from granatum.v1.errors import Unavailable

FETCH_S = 120.0
"""The longest time for one adapter."""
STALL_S = 10.0
"""The longest time in which nothing of an adapter arrives."""
_CANCELLING_S = 1.0
_RETRY_AFTER_S = 5.0

log = structlog.get_logger(__name__)


class Fetches:
    """Fetches from one store.

    The event loop has a thread of its own, which lasts as long as the process. So any number of
    fetches may hang without keeping the others waiting.
    """

    def __init__(
        self, objects: Objects, fetch_s: float = FETCH_S, stall_s: float = STALL_S
    ) -> None:
        self._objects = objects
        self._fetch_s = fetch_s
        self._stall_s = stall_s
        self._loop = asyncio.new_event_loop()
        self._running: dict[str, Future[Path]] = {}
        threading.Thread(target=self._loop.run_forever, name="adapter-fetch", daemon=True).start()

    def fetch(self, digest: str, directory: Path) -> Path:
        """Fetch an adapter's files below `directory` and verify them; returns their folder. Blocks.

        Raises GranatumError. Reason ADAPTER_LOAD_STALLED: nothing arrived for `stall_s`, or all of
        it took longer than `fetch_s`. Reason ADAPTER_LOAD_ABANDONED: `abandon` was called.
        """
        future = asyncio.run_coroutine_threadsafe(self._bring(digest, directory), self._loop)
        self._running[digest] = future
        try:
            return future.result()
        except CancelledError as error:
            raise abandoned() from error
        finally:
            self._running.pop(digest, None)

    def abandon(self, digest: str) -> None:
        """Give up the fetch of a digest, if there is one."""
        future = self._running.get(digest)
        if future is not None:
            future.cancel()

    async def _bring(self, digest: str, directory: Path) -> Path:
        progress = _Progress()
        blobs = Blobs(self._objects.watched(progress.note))
        task = asyncio.create_task(blobs.fetch(digest, directory))
        deadline = time.monotonic() + self._fetch_s
        try:
            while not task.done():
                ends = min(progress.last + self._stall_s, deadline)
                if time.monotonic() >= ends:
                    raise self._stalled(digest)
                await asyncio.wait({task}, timeout=ends - time.monotonic())
            return task.result().config.parent
        finally:
            await _end(task, digest)

    def _stalled(self, digest: str) -> Unavailable:
        log.warning("adapter fetch stalled", digest=digest)
        return Unavailable(
            f"the object store did not bring adapter sha256:{digest} within {self._fetch_s:g} s, "
            f"or nothing of it for {self._stall_s:g} s: try again",
            reason="ADAPTER_LOAD_STALLED",
            retry_after_s=_RETRY_AFTER_S,
        )


class _Progress:
    """Notes when something last arrived."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self) -> None:
        self.last = time.monotonic()


async def _end(task: "asyncio.Task[object]", digest: str) -> None:
    """Cancel the task; a task that does not end soon is left to itself."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait({task}, timeout=_CANCELLING_S)
    if not task.done():
        log.warning("adapter fetch does not end", digest=digest)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
