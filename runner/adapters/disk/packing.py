"""Packs adapters' files into images, in processes of their own.

Packing is Python work on files of strangers. In the engine's process it would hold the interpreter
while a step waits, and a crash would end every stream. A packer's process takes only the
processors' spare time, and its crash fails one load.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import Empty, LifoQueue

import structlog

from granatum.runner.adapters.images.file import write_image
from granatum.runner.adapters.images.image import ImageShape, build_image
from granatum.service.logs import log_as_json
from granatum.v1.errors import GranatumError, Internal, Unavailable

PROCESSES = 2
"""More than one, so that an adapter that takes long does not hold up all others."""
PACKING_S = 60.0
"""The longest time for one adapter; the largest takes a few seconds."""
_CPU_S, _CPU_BYTES_PER_S = 2.0, 50e6
"""The processor time for one adapter: seconds for all, and more in proportion to its bytes.

A config with slower patterns must not hold up other adapters.
"""
_NICENESS = 5
_OOM_SCORE = "500"
"""Makes the system end a packer before an engine where memory is short."""

log = structlog.get_logger(__name__)


def pack_image(shape: ImageShape, files: Path, target: Path, digest: str) -> int:
    """Pack an adapter's two files into the image file `target`; returns the image's pages.

    Raises InvalidAdapter.
    """
    image = build_image(files, shape)
    write_image(target, digest, shape, image)
    return int(image.pages.shape[0])


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of `pack_image`, but for the shape."""

    files: Path
    target: Path
    digest: str


class Packers:
    """Processes that pack images of one shape. They end when this process ends, however it ends."""

    def __init__(self, shape: ImageShape) -> None:
        self._shape = shape
        self._idle: LifoQueue[_Packer | None] = LifoQueue()
        for _ in range(PROCESSES - 1):
            self._idle.put(None)  # a process that is started once all others are busy
        self._idle.put(_Packer(shape))

    def pack(self, files: Path, target: Path, digest: str) -> int:
        """Do `pack_image` in a process. Raises Unavailable if it ended or took too long."""
        try:
            packer = self._idle.get(timeout=PACKING_S)
        except Empty as error:
            raise _unpacked("is busy with others") from error
        try:
            if packer is None or not packer.is_alive:
                packer = _Packer(self._shape)
            return packer.pack(_Job(files, target, digest))
        finally:
            self._idle.put(packer)

    def close(self) -> None:
        """End the idle processes."""
        while not self._idle.empty():
            packer = self._idle.get()
            if packer is not None:
                packer.end()


class _Packer:
    """One process, and our end of the pipe to it."""

    def __init__(self, shape: ImageShape) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        self._pipe.send(shape)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def pack(self, job: _Job) -> int:
        try:
            self._pipe.send(job)
            if not self._pipe.poll(PACKING_S):
                raise TimeoutError(f"no answer within {PACKING_S:g} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.end()
            status = self._process.returncode
            log.error("adapter packing ended", digest=job.digest, status=status, reason=str(error))
            raise _unpacked("could not pack it: try a smaller one, or simpler patterns") from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, int)
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def _unpacked(why: str) -> Unavailable:
    return Unavailable(
        f"the adapter was not loaded, for the runner {why}; try again",
        reason="ADAPTER_PACKING_FAILED",
        retry_after_s=5.0,
    )


def _attempt(shape: ImageShape, job: _Job) -> int | Exception:
    """The image's pages, or the error to raise; the timer ends a process that works too long."""
    try:
        size = sum(file.stat().st_size for file in job.files.iterdir())
        signal.setitimer(signal.ITIMER_PROF, _CPU_S + size / _CPU_BYTES_PER_S)
        return pack_image(shape, job.files, job.target, job.digest)
    except (GranatumError, OSError) as error:
        return error
    except Exception as error:
        log.error("adapter packing", digest=job.digest, exc_info=error)
        return Internal("the adapter could not be packed: the runner's log has the details")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """A packer's process: one job at a time until the other end is closed."""
    log_as_json()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine ends us
    os.nice(_NICENESS)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    pipe = Connection(int(sys.argv[1]))
    with suppress(EOFError, ConnectionError):
        shape = pipe.recv()
        while True:
            pipe.send(_attempt(shape, pipe.recv()))


if __name__ == "__main__":
    main()
