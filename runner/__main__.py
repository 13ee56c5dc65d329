"""`python -m granatum.runner`: serve until SIGTERM or SIGINT."""

import asyncio
import sys

import structlog

from granatum.runner.engine.child import EngineChild
from granatum.runner.front.engine_end import cause_of
from granatum.runner.settings import RunnerSettings
from granatum.runner.text.torchless import import_transformers
from granatum.service.logs import log_as_json
from granatum.service.settings import read_settings
from granatum.service.tasks import serve_until, stop_signal
from granatum.v1.errors import GranatumError

SWITCH_S = 0.001
"""Longest time that a thread which prepares a long text goes on in Python while the loop waits."""

log = structlog.get_logger("granatum.runner")


def main() -> int:
    """Run a runner; the exit status, not 0 if it could not serve. The last log line says why."""
    log_as_json()
    try:
        asyncio.run(serve(read_settings(RunnerSettings)))
    except Exception as error:
        if not isinstance(error, GranatumError):
            log.exception("the runner failed")
        log.error("cannot serve", error=cause_of(error))
        return 1
    return 0


async def serve(settings: RunnerSettings) -> None:
    """Serve until a signal asks to stop, or a part of the runner fails, which it raises."""
    sys.setswitchinterval(SWITCH_S)
    child = EngineChild(settings)
    import_transformers()  # while the engine loads in its own process
    from granatum.runner.app import RunnerApp

    stopped = stop_signal()
    async with RunnerApp(settings, child) as runner:
        await serve_until(stopped, *runner.parts)


if __name__ == "__main__":
    sys.exit(main())
