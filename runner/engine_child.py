"""The engine as a child process of the front. Here, in the front, it needs no torch."""

import asyncio
import dataclasses
import multiprocessing
import socket
from typing import TYPE_CHECKING

from granatum.runner.channel import AsyncChannel, socket_pair
from granatum.runner.logs import log_as_json
from granatum.runner.records import Command, Report
from granatum.runner.settings import Settings
from granatum.runner.torchless import import_transformers

if TYPE_CHECKING:
    from granatum.runner.engine_process import EngineOptions

_CPU_BATCH = 8


class EngineChild:
    """The engine's process. It ends when the front does, because its channel then closes."""

    def __init__(self, settings: Settings) -> None:
        ours, theirs = socket_pair()
        self._end = ours
        self._process = multiprocessing.get_context("spawn").Process(
            target=_main, args=(settings, theirs), name="engine", daemon=True
        )
        self._process.start()
        theirs.close()

    async def connect(self) -> AsyncChannel[Command, Report]:
        """The front's end of the channel."""
        return await AsyncChannel.open(self._end)

    async def stopped(self, grace_s: float) -> int | None:
        """Its exit status; it is killed if it does not end within the grace."""
        await asyncio.to_thread(self._process.join, grace_s)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        return self._process.exitcode


def _main(settings: Settings, end: socket.socket) -> None:
    log_as_json()
    import_transformers()
    import torch

    from granatum.runner.adapter_source import AdapterSource
    from granatum.runner.engine_process import run

    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = AdapterSource(settings.store, settings.cache_dir, settings.disk_cache_bytes)
    run(_options(settings, device), source, end)


def _options(settings: Settings, device: str) -> "EngineOptions":
    """What the engine is built with on `device`."""
    from granatum.runner.arena import host_bytes
    from granatum.runner.engine_process import EngineOptions

    options = EngineOptions(
        model=settings.model,
        device=device,
        step_tokens=settings.prefill_tokens,
        max_context=settings.max_context,
        max_rank=settings.max_rank,
        arena_bytes=settings.arena_bytes,
        memory_share=settings.memory_fraction,
        random_weights=settings.random_weights,
    )
    on_cpu = device == "cpu"
    max_batch = settings.max_batch or (_CPU_BATCH if on_cpu else options.max_batch)
    host = settings.host_cache_bytes
    if host is None:
        host = host_bytes(settings.model, settings.max_rank) if on_cpu else options.host_bytes
    return dataclasses.replace(options, max_batch=max_batch, host_bytes=host)
