"""`python -m granatum.router`: serve until SIGTERM or SIGINT."""

import asyncio
import logging
import signal
import sys

import structlog
from pydantic import ValidationError

from granatum.router.app import Router
from granatum.router.settings import Settings
from granatum.v1.errors import GranatumError

log = structlog.get_logger("granatum.router")


def main() -> int:
    """Run a router; the exit status."""
    log_as_json()
    try:
        asyncio.run(serve(read_settings()))
    except GranatumError as error:
        log.error("cannot serve", error=error.message)
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
    """Serve until a signal asks to stop, or a background task fails, which it raises."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with Router(settings) as router:
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait({stopping, router.background}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        if router.background.done():
            await router.background


def log_as_json() -> None:
    """One JSON object a line on standard error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    sys.exit(main())
