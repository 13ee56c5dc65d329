"""The engine's process: commands in, one report per step out.

drain commands -> capture a graph if one is due -> step -> report
when idle: wait for a command, probe the device, report
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from granatum.adapters_store.limits import padded_rank
from granatum.kernels.device import gpu_of
from granatum.kernels.tables import tables
from granatum.models.base_model import BaseModel
from granatum.models.config import ModelConfig, read_config
from granatum.runner.adapters.cache import AdapterCache
from granatum.runner.adapters.images.image import ImageShape
from granatum.runner.channel import Channel, ChannelClosed
from granatum.runner.engine.engine import Capacity, Engine, EngineLost
from granatum.runner.engine.execution.executor import Executor
from granatum.runner.engine.flight_recorder import FlightRecorder
from granatum.runner.engine.phases import phase
from granatum.runner.engine.scheduling.plan import EngineLimits
from granatum.runner.model.adapter_loader import AdapterLoader, ImageSource
from granatum.runner.model.arena import (
    allocate_arena,
    allocate_table,
    page_tokens,
    pages_that_fit,
)
from granatum.runner.model.decoder import Model
from granatum.runner.model.dtypes import Dtypes
from granatum.runner.model.weights import Weights, load_weights, random_weights
from granatum.runner.pages import PagePool
from granatum.runner.records import (
    Cancel,
    Command,
    EngineFault,
    Ready,
    Report,
    SetDraining,
    StepReport,
    Stop,
    Submit,
)
from granatum.runner.tune.tasks import FIELDS, unmeasured
from granatum.v1.errors import InvalidRequest

PROBE_S = 0.4
"""Seconds between reports of an idle engine."""
POLL_S = 0.001
"""Seconds between polls for loading adapters while the engine has nothing else to do."""
LOST_STATUS = 70
"""Of the process, when the engine is lost."""
SWITCH_S = 0.0001
"""Longest time that a fetching thread holds the interpreter while a step waits."""

CPU_ARENA_BYTES = 256 << 20
"""The arena of an engine on a CPU, where no size is given."""

log = structlog.get_logger(__name__)

OpenSource = Callable[[ImageShape], ImageSource]
"""Where the engine's adapters come from, once the shape of their images is known."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to build an engine; everything can be pickled."""

    model: Path
    """A Hugging Face directory."""
    device: str = "cuda"
    """`cuda`, `cuda:1`, ..., computing in bfloat16; `cpu`, in float32."""
    max_batch: int = 64
    max_waiting: int = 64
    prefill_tokens: int = 512
    """Rows of a step, decodes and prompt chunks together; at least `max_batch`."""
    max_context: int | None = None
    """Tokens of a sequence; None: as many as the model and the arena allow."""
    max_rank: int = 64
    """The largest rank of an adapter."""
    adapter_slots: int = 512
    """Adapters on the device at a time, as far as there are pages for them."""
    host_cache_bytes: int = 4 << 30
    """Pinned host memory for adapters."""
    arena_bytes: int | None = None
    """Memory for KV and adapters; None: what the GPU has left, up to `memory_fraction`."""
    memory_fraction: float = 0.9
    tables: Path | None = None
    """The user's measured tables; None: the packaged ones alone."""
    random_weights: bool = False
    """Draw the weights instead of reading them; only the configuration is read."""

    @property
    def dtypes(self) -> Dtypes:
        """Of weights, KV and adapters."""
        return Dtypes.on(torch.device(self.device))


def run(
    options: EngineOptions,
    open_source: OpenSource,
    end: socket.socket,
    recorder: FlightRecorder | None = None,
) -> None:
    """The process's main: build the engine, serve until Stop. An error ends the process.

    `recorder`: where the front finds what was computed, should the process die.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front ends us, after its streams
    channel: Channel[Report, Command] = Channel(end)
    try:
        engine = build_engine(options, open_source, recorder)
        sys.setswitchinterval(SWITCH_S)  # not before: threads that compile would switch for nothing
        serve(engine, channel)
    except ChannelClosed:
        log.info("the front is gone")
    except EngineLost as lost:
        log.exception("the engine is lost", sequences=lost.sequences)
        sys.stderr.flush()
        os._exit(LOST_STATUS)  # neither the device nor threads that fetch are waited for
    except Exception:
        log.exception("the engine failed")
        raise


def build_engine(
    options: EngineOptions, open_source: OpenSource, recorder: FlightRecorder | None = None
) -> Engine:
    """Load the model, take the memory, compile the kernels, capture the first graphs.

    Raises:
        InvalidRequest: what the model directory or an option should be instead.
    """
    started = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny models, several runners on a machine
    else:
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise InvalidRequest(
                f"there is no {device} here, where PyTorch sees {count} GPUs: give another --device"
            )
        torch.cuda.set_device(device.index or 0)
    config = read_config(options.model)
    context = _context(options, config)
    _read_tables(options, config, device)
    with phase("reading weights", "weights loaded"):
        weights = _weights(options, config, device)
    tokens = page_tokens(config, options.max_rank)
    pages = _pages(options, config, tokens, device)
    limits = _limits(options, config, context, tokens, pages)
    arena = allocate_arena(config, tokens, pages, options.dtypes.kv, device)
    rank = padded_rank(options.max_rank)  # as adapters lie in the arena
    table = allocate_table(config, options.adapter_slots, device, rank)
    base = BaseModel.from_config(options.model)
    elements = arena.kv.page_elements
    source = open_source(ImageShape(base, str(options.dtypes.adapters), elements, options.max_rank))
    loader = AdapterLoader(arena.pages, table, source, options.host_cache_bytes)
    pool = PagePool(pages)
    executor = Executor(Model(config, weights, arena, table, limits), limits)
    largest = min(pages - 1, loader.host_pages) * arena.kv.page_elements
    capacity = Capacity(options.max_rank, largest, executor.measure())
    cache = AdapterCache(pool, loader, options.adapter_slots)
    log.info("engine ready", pages=pages, seconds=round(time.monotonic() - started, 1))
    return Engine(executor, limits, pool, cache, recorder, capacity)


def _read_tables(options: EngineOptions, config: ModelConfig, device: torch.device) -> None:
    """Take the user's tables, and say once what was never measured."""
    if device.type == "cpu":
        return
    gpu = gpu_of(device)
    try:
        if options.tables is not None:
            tables.add(options.tables, gpu, FIELDS)
    except ValueError as error:
        raise InvalidRequest(f"{error}: remove it, or give other --tables") from error
    if missing := unmeasured(config, options.max_rank, gpu):
        command = f"granatum tune --model {options.model} --max-rank {options.max_rank}"
        if options.tables is not None:
            command += f" --out {options.tables}"
        log.warning(
            "kernels run by defaults that nobody measured", gpu=gpu.name, shapes=missing,
            command=command,
        )  # fmt: skip


def _weights(options: EngineOptions, config: ModelConfig, device: torch.device) -> Weights:
    if options.random_weights:
        return random_weights(config, options.dtypes.weights, device)
    return load_weights(config, options.model, options.dtypes.weights, device)


def _pages(options: EngineOptions, config: ModelConfig, tokens: int, device: torch.device) -> int:
    """Pages of the arena."""
    page_bytes = tokens * config.kv_elements * options.dtypes.kv.itemsize
    arena_bytes = options.arena_bytes
    if arena_bytes is None and device.type == "cpu":
        arena_bytes = CPU_ARENA_BYTES
    if arena_bytes is None:
        pages = pages_that_fit(page_bytes, device, options.memory_fraction)
    else:
        pages = arena_bytes // page_bytes
    if pages < 2:
        raise InvalidRequest(
            f"the arena for KV and adapters has room for {pages} pages of {page_bytes} bytes: "
            "give it more memory, or choose a smaller model or a smaller largest rank"
        )
    return pages


def _context(options: EngineOptions, config: ModelConfig) -> int:
    """Tokens of a sequence, as far as the model can be computed exactly."""
    exact, field = config.context
    wanted = options.max_context
    if wanted is None:
        if exact < config.max_positions:
            log.warning("sequences are shorter than the model's positions", max_context=exact,
                        because=field, positions=config.max_positions)  # fmt: skip
        return exact
    if wanted > exact:
        raise InvalidRequest(
            f"--max-context {wanted} is not supported: {field} of config.json lets this model be "
            f"computed exactly up to {exact} tokens; give --max-context {exact} or less"
        )
    return wanted


def _limits(
    options: EngineOptions, config: ModelConfig, context: int, tokens: int, pages: int
) -> EngineLimits:
    return EngineLimits(
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
        prefill_tokens=max(options.prefill_tokens, options.max_batch),
        page_tokens=tokens,
        max_context=min(context, pages * tokens),
        vocabulary=config.vocab,
    )


def serve(engine: Engine, channel: Channel[Report, Command]) -> None:
    """Run `engine` until the front sends Stop or is gone.

    Raises:
        EngineLost: nothing can be computed any more; the front was told.
    """
    channel.send(_ready(engine))
    try:
        _serve(engine, channel)
    except EngineLost as lost:
        channel.send(EngineFault(lost.sequences, str(lost)))
        raise


def _ready(engine: Engine) -> Ready:
    limits, capacity = engine.limits, engine.capacity
    return Ready(
        limits.max_batch,
        limits.page_tokens,
        limits.max_context,
        engine.figures,
        capacity.max_rank,
        capacity.max_adapter_elements,
        capacity.step_s,
    )


def _serve(engine: Engine, channel: Channel[Report, Command]) -> None:
    reported = time.monotonic()
    resident: tuple[str, ...] = ()
    while True:
        for command in channel.receive_all(_patience(engine, reported)):
            if isinstance(command, Stop):
                return
            obey(engine, command)
        if engine.graph_due:
            engine.capture()
        news = engine.step()
        overdue = time.monotonic() - reported >= PROBE_S
        if overdue and not engine.in_flight:
            engine.probe()
        if news or overdue:
            before, resident = resident, engine.resident
            told = None if resident is before else resident
            channel.send(StepReport(tuple(news), engine.figures, told))
            reported = time.monotonic()


def _patience(engine: Engine, reported: float) -> float:
    """Seconds to wait for a command: none while there is something to do."""
    if engine.in_flight or engine.graph_due:
        return 0.0
    if engine.busy:
        return POLL_S
    return max(PROBE_S - (time.monotonic() - reported), 0.0)


def obey(engine: Engine, command: Submit | Cancel | SetDraining) -> None:
    """Do what the front asks."""
    match command:
        case Submit():
            engine.submit(command)
        case Cancel():
            engine.cancel(command.sequence_id)
        case SetDraining():
            engine.set_draining(command.draining)
