"""What a start waits for, said in the log as it begins and as it ends."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger(__name__)


@contextmanager
def phase(begins: str, ended: str, **facts: object) -> Iterator[None]:
    """Log `begins`, and after the block `ended` with its seconds; `facts` stand in both lines."""
    started = time.monotonic()
    log.info(begins, **facts)
    yield
    log.info(ended, **facts, seconds=round(time.monotonic() - started, 1))
