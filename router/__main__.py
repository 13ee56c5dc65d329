"""`python -m granatum.router`: serve until SIGTERM or SIGINT."""

import asyncio
import sys

import structlog

from granatum.router.app import RouterApp
from granatum.router.settings import RouterSettings
from granatum.service.logs import log_as_json
from granatum.service.settings import read_settings
from granatum.service.tasks import serve_until, stop_signal
from granatum.v1.errors import GranatumError

log = structlog.get_logger("granatum.router")


def main() -> int:
    """Run a router; the exit status."""
    log_as_json()
    try:
        asyncio.run(serve(read_settings(RouterSettings)))
    except GranatumError as error:
        log.error("cannot serve", error=error.message)
        return 1
    return 0


async def serve(settings: RouterSettings) -> None:
    """Serve until a signal asks to stop, or a background task fails, which it raises."""
    stopped = stop_signal()
    async with RouterApp(settings) as router:
        await serve_until(stopped, router.background)


if __name__ == "__main__":
    sys.exit(main())
