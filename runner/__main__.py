"""`python -m granatum.runner`: serve until SIGTERM or SIGINT."""

import asyncio
import signal
import sys

import structlog
from pydantic import ValidationError

from granatum.runner.engine.child import EngineChild
from granatum.runner.front.engine_end import cause_of
from granatum.runner.logs import log_as_json
from granatum.runner.settings import Settings
from granatum.runner.tasks import cancelled
from granatum.runner.text.torchless import import_transformers
from granatum.v1.errors import GranatumError

SWITCH_S = 0.001
"""Longest time that a thread which prepares a long text goes on in Python while the loop waits."""

log = structlog.get_logger("granatum.runner")


def main() -> int:
    """Run a runner; the exit status, not 0 if it could not serve. The last log line says why."""
    log_as_json()
    try:
        asyncio.run(serve(read_settings()))
    except Exception as error:
        if not isinstance(error, GranatumError):
            log.exception("the runner failed")
        log.error("cannot serve", error=cause_of(error))
        return 1
    return 0


def read_settings() -> Settings:
    """From the command line and the environment; ends the process if they are not right."""
    try:
        return Settings(_cli_parse_args=True)  # type: ignore[call-arg]
    except ValidationError as error:
        flags = ((".".join(map(str, e["loc"])).replace("_", "-"), e) for e in error.errors())
        wrong = [f"--{flag}: {e['msg']}" for flag, e in flags]
        log.error("the settings are not right", wrong=wrong)
        sys.exit(2)


async def serve(settings: Settings) -> None:
    """Serve until a signal asks to stop, or a part of the runner fails, which it raises."""
    sys.setswitchinterval(SWITCH_S)
    child = EngineChild(settings)
    import_transformers()  # while the engine loads in its own process
    from granatum.runner.app import Runner

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with Runner(settings, child) as runner:
        stopping = asyncio.create_task(stopped.wait())
        failing = asyncio.create_task(runner.fail())
        await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
        await cancelled(stopping)
        if failing.done():
            await failing
        await cancelled(failing)


if __name__ == "__main__":
    sys.exit(main())
