"""Parts of a benchmark in processes of their own, so that all they held is free afterwards."""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from results import Row

Part = Callable[[argparse.Namespace], Iterator[Row]]


def in_child(part: Part, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of a part; a child that fails ends us too."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(part, args, theirs))
    child.start()
    theirs.close()
    while True:
        try:
            yield ours.recv()
        except EOFError:
            break
    child.join()
    if child.exitcode:
        raise SystemExit(f"{part.__name__} failed")


def _send(part: Part, args: argparse.Namespace, end: Connection) -> None:
    for row in part(args):
        end.send(row)
