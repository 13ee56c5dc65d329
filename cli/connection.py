"""How a command finds its router, and the key that it shows there."""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from granatum.client.client import Client
from granatum.v1.errors import DeadlineExceeded, InvalidRequest, Unauthenticated, Unavailable
from granatum.v1.transport import Tls

DEFAULT_ADDRESS = "127.0.0.1:7070"
_OUT_OF_TIME = "Deadline Exceeded"
"""In gRPC's own words, alone or in a sentence. A service would say what took so long."""

_PANEL = "Connection"
Address = Annotated[
    str,
    typer.Option(envvar="GRANATUM_ADDRESS", help="The router, host:port.", rich_help_panel=_PANEL),
]
Key = Annotated[
    str,
    typer.Option(
        envvar="GRANATUM_KEY",
        help="The tenant's or admin's key.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", envvar="GRANATUM_TLS_CA", help="Trust this CA (PEM).", rich_help_panel=_PANEL
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        envvar="GRANATUM_TLS_CERT",
        help="Our certificate (PEM), for mutual TLS.",
        rich_help_panel=_PANEL,
    ),
]
CertKey = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        envvar="GRANATUM_TLS_KEY",
        help="Our certificate's key (PEM).",
        rich_help_panel=_PANEL,
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Plaintext beyond this machine.", rich_help_panel=_PANEL),
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds after which to give up.", rich_help_panel=_PANEL),
]


def connect(
    address: Address = DEFAULT_ADDRESS,
    key: Key = "",
    tls_ca: Ca = None,
    tls_cert: Cert = None,
    tls_key: CertKey = None,
    insecure: Insecure = False,
    timeout: Timeout = None,
) -> Client:
    """A client of the router that the command line or the environment names."""
    tls = Tls.given(tls_cert, tls_key, tls_ca)
    return Client(address, key=key, tls=tls, insecure=insecure, timeout=timeout)


def connected(command: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a command of a coroutine function.

    Its first parameter, the client, is replaced by connection options.
    """
    own = list(inspect.signature(command).parameters.values())[1:]
    connection = list(inspect.signature(connect).parameters.values())

    @functools.wraps(command)
    def run(**given: Any) -> None:
        where = {p.name: given.pop(p.name) for p in connection}

        async def talk() -> None:
            async with connect(**where) as client:
                await command(client, **given)

        with named(where["address"]), _options_named(where["key"]):
            asyncio.run(talk())

    # Typer makes the command's options from these two.
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *connection)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@contextmanager
def named(address: str) -> Iterator[None]:
    """Replace gRPC's words by what to do, where nobody listens or nothing answers in time."""
    try:
        yield
    except Unavailable as error:
        if not error.message.startswith("failed to connect"):
            raise
        if ":" not in address:
            raise InvalidRequest(
                f"{address!r} is no host:port: give one such as {DEFAULT_ADDRESS}"
            ) from None
        raise Unavailable(
            f"nothing answers on {address}: start it with granatum up, "
            "or name the router with --address or GRANATUM_ADDRESS"
        ) from None
    except DeadlineExceeded as error:
        if _OUT_OF_TIME not in error.message:
            raise
        raise DeadlineExceeded(f"{address} gave no full answer in time") from None


@contextmanager
def _options_named(key: str) -> Iterator[None]:
    """Name the option that would help. Services and gRPC do not know our options."""
    try:
        yield
    except Unauthenticated:
        if key:
            raise
        raise Unauthenticated(
            "there is no key: give the one that granatum up or granatum keys add printed, "
            "with --key or GRANATUM_KEY"
        ) from None
    except DeadlineExceeded as error:
        if _OUT_OF_TIME not in error.message:
            raise
        raise DeadlineExceeded("no full answer within --timeout: give it longer") from None
