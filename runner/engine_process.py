"""The engine's process: commands in, one report per step out.

drain commands -> step -> report; when idle: wait for a command, probe the device, report
"""

import time

import structlog

from granatum.runner.channel import Channel
from granatum.runner.engine import Engine
from granatum.runner.records import (
    Cancel,
    Command,
    Ready,
    Report,
    SetDraining,
    StepReport,
    Stop,
    Submit,
)

PROBE_S = 0.4
"""Seconds between reports of an idle engine."""
POLL_S = 0.001
"""Seconds between looks at adapters on their way while nothing else is to do."""

log = structlog.get_logger(__name__)


def serve(engine: Engine, channel: "Channel[Report, Command]") -> None:
    """Run `engine` until the front sends Stop or is gone; an exception of a step goes up."""
    channel.send(
        Ready(
            engine.limits.max_batch,
            engine.limits.page_tokens,
            engine.limits.max_context,
            engine.figures,
        )
    )
    reported = time.monotonic()
    while True:
        for command in channel.receive_all(_patience(engine, reported)):
            if isinstance(command, Stop):
                return
            obey(engine, command)
        news = engine.step()
        overdue = time.monotonic() - reported >= PROBE_S
        if overdue and not engine.in_flight:
            engine.probe()
        if news or engine.in_flight or overdue:
            channel.send(StepReport(tuple(news), engine.figures))
            reported = time.monotonic()


def _patience(engine: Engine, reported: float) -> float:
    """Seconds to wait for a command: none while the device works."""
    if engine.in_flight:
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
