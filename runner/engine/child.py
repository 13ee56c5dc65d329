"""The engine as a child process of the front. This file runs in the front and needs no torch."""

import asyncio
import ctypes
import dataclasses
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from granatum.runner.channel import AsyncChannel, socket_pair
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.front.engine_end import EngineEnd, cause_of
from granatum.runner.records import Command, Report
from granatum.runner.settings import MAX_BATCH, RunnerSettings
from granatum.runner.text.torchless import import_transformers
from granatum.service.logs import log_as_json

if TYPE_CHECKING:
    from granatum.runner.engine.process import EngineOptions

_CPU_BATCH = 8
_WORDS = 2048


class LastWords:
    """Why the engine ends, in memory that outlives it."""

    def __init__(self) -> None:
        self._text = multiprocessing.RawArray(ctypes.c_char, _WORDS)

    def say(self, text: str) -> None:
        """The child's."""
        self._text.value = text.replace("\0", "").encode()[: _WORDS - 1]

    def read(self) -> str:
        """The parent's, once the child is gone; empty if it said nothing."""
        said: bytes = self._text.value
        return said.decode(errors="ignore")


class EngineChild:
    """The engine's process. It ends when the front does, because its channel then closes."""

    def __init__(self, settings: RunnerSettings) -> None:
        ours, theirs = socket_pair()
        self._end = ours
        self._recorder = FlightRecorder(MAX_BATCH)
        self._words = LastWords()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_main,
            args=(settings, theirs, self._recorder, self._words),
            name="engine",
            daemon=True,
        )
        self._process.start()
        theirs.close()

    async def connect(self) -> AsyncChannel[Command, Report]:
        """The front's end of the channel."""
        return await AsyncChannel.open(self._end)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    async def ended(self, grace_s: float) -> EngineEnd:
        """How it ended; it is killed if it does not end within the grace."""
        await asyncio.to_thread(self._process.join, grace_s)
        lingers = self._process.is_alive()
        if lingers:
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        status = self._process.exitcode or 0
        return EngineEnd(status, self._recorder.read(), self._words.read(), own=lingers)


def _main(
    settings: RunnerSettings, end: socket.socket, recorder: FlightRecorder, words: LastWords
) -> None:
    log_as_json()
    keep_kernels(settings.cache_dir)
    import_transformers()
    try:
        _run(settings, end, recorder)
    except Exception as error:  # the engine has logged it
        words.say(cause_of(error))
        sys.exit(1)


def keep_kernels(cache_dir: Path) -> None:
    """Have Triton keep what it compiles in `cache_dir`, unless the user chose another folder."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir.absolute() / "kernels"))


def _run(settings: RunnerSettings, end: socket.socket, recorder: FlightRecorder) -> None:
    import torch

    from granatum.runner.adapters.disk.source import AdapterSource
    from granatum.runner.engine.process import run

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = AdapterSource(settings.store, settings.cache_dir, settings.disk_cache_bytes)
    run(_options(settings, device), source, end, recorder)


def _options(settings: RunnerSettings, device: str) -> "EngineOptions":
    """What the engine is built with on `device`."""
    from granatum.runner.engine.process import EngineOptions
    from granatum.runner.model.arena import cpu_host_cache_bytes

    options = EngineOptions(
        model=settings.model,
        device=device,
        prefill_tokens=settings.prefill_tokens,
        max_context=settings.max_context,
        max_rank=settings.max_rank,
        arena_bytes=settings.arena_bytes,
        memory_fraction=settings.memory_fraction,
        tables=settings.tables or settings.cache_dir / "tables",
        random_weights=settings.random_weights,
    )
    on_cpu = device == "cpu"
    max_batch = settings.max_batch or (_CPU_BATCH if on_cpu else options.max_batch)
    host: int | None = settings.host_cache_bytes
    if host is None and on_cpu:
        host = cpu_host_cache_bytes(settings.model, settings.max_rank)
    elif host is None:
        host = options.host_cache_bytes
    return dataclasses.replace(options, max_batch=max_batch, host_cache_bytes=host)
