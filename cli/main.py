"""The command line `granatum`."""

import asyncio
import io
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from granatum.cli import commands, connection
from granatum.cli.box.box import ADMIN, Box
from granatum.cli.box.layout import Layout
from granatum.cli.health import is_serving
from granatum.cli.keys import keys
from granatum.v1.errors import GranatumError, InvalidRequest, PreconditionFailed
from granatum.v1.transport import Tls, is_loopback, reachable

app = typer.Typer(
    help="Serve many tenants' LoRA adapters from one base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(commands.generate)
app.add_typer(commands.adapters, name="adapters")
app.add_typer(commands.runners, name="runners")
app.add_typer(keys, name="keys")

console = Console(highlight=False, soft_wrap=True, markup=False)
_Cert = Annotated[Path | None, typer.Option(help="Serve clients with this certificate (PEM).")]
_CertKey = Annotated[Path | None, typer.Option(help="The key of --tls-cert (PEM).")]
_ClientsCa = Annotated[
    Path | None, typer.Option(help="Demand clients' certificates of this CA (PEM).")
]
_Insecure = Annotated[bool, typer.Option("--insecure", help="Plaintext beyond this machine.")]
_LIBRARIES = {"router": "redis", "runner": "torch"}
"""Libraries that show whether an extra is installed."""
_FOREIGN = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def main() -> None:
    """Run the command line; an error is one clear line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # letters that the terminal lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        sys.stderr.write(f"granatum: what it was given is not UTF-8 text ({error.reason})\n")
        sys.exit(1)
    except GranatumError as error:
        hint = f" (retry in {error.retry_after_s:.0f} s)" if error.retry_after_s else ""
        sys.stderr.write(f"granatum: {error.message}{hint}\n")
        sys.exit(1)


@app.command()
def up(
    model: Annotated[Path, typer.Option(help="A Hugging Face model's folder.")],
    listen: Annotated[
        str, typer.Option(help="Where clients reach it.")
    ] = connection.DEFAULT_ADDRESS,
    runners: Annotated[
        int | None, typer.Option(min=1, help="Absent: one per GPU, or one.", show_default=False)
    ] = None,
    state: Annotated[Path, typer.Option(help="Keeps adapters, keys, logs, caches.")] = Path(
        "~/.granatum"
    ),
    store: Annotated[
        str | None, typer.Option(help="Adapters' object store: s3://, gs://, az://, file://")
    ] = None,
    tls_cert: _Cert = None,
    tls_key: _CertKey = None,
    tls_ca: _ClientsCa = None,
    insecure: _Insecure = False,
    redis: Annotated[
        str | None, typer.Option(help="A Redis-protocol server; absent: an embedded Valkey.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="Where the processes log.")] = None,
    runner_arguments: Annotated[
        list[str] | None, typer.Argument(help="After --, for every runner.", show_default=False)
    ] = None,
) -> None:
    """Serve a model on this machine: router, one runner per GPU, Valkey."""
    layout = Layout(
        model=model.expanduser().resolve(),
        state=state.expanduser().resolve(),
        listen=listen,
        tls=_served_tls(tls_cert, tls_key, tls_ca),
        insecure=insecure,
        runners=runners,
        redis=redis,
        store=store,
        logs=logs and logs.expanduser().resolve(),
        runner_arguments=tuple(runner_arguments or ()),
    )
    asyncio.run(_serve(layout))


def _served_tls(cert: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    tls = Tls.given(cert, key, ca)
    if tls is not None and tls.cert is None:
        raise InvalidRequest("to demand clients' certificates (--tls-ca) give --tls-cert, too")
    return tls


async def _serve(layout: Layout) -> None:
    serving = asyncio.current_task()
    assert serving is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        async with AsyncExitStack() as exits:
            with console.status(f"starting {layout.model.name}"):
                box = await exits.enter_async_context(Box(layout, _say))
            _introduce(box)
            await box.watch()
    except asyncio.CancelledError:
        console.print("stopped")


def _say(text: str) -> None:
    """Print, even if nobody reads standard output any more or its disk is full."""
    with suppress(OSError):
        typer.echo(text)


def _introduce(box: Box) -> None:
    console.print(f"logs      are in {box.layout.log_directory}")
    if not box.keys:
        console.print(
            f"keys      are those of {box.layout.keys_file}, one more is made by\n"
            f"          granatum keys add --tenant default --file {box.layout.keys_file}"
        )
        key = "<key>"
    else:
        key = box.keys["default"]
        console.print(f"tenant    key {key}   shown this once")
        console.print(f"admin     key {box.keys[ADMIN]}   shown this once")
    console.print("\nTalk to it:\n")
    console.print(
        f"  granatum generate --address {reachable(box.address)}{_trust(box.layout)} "
        f"--key {key} 'Once upon a time'\n",
        soft_wrap=True,
    )


def _trust(layout: Layout) -> str:
    """The options with which clients reach the box."""
    if layout.tls is not None:
        return " --tls-ca <the PEM file of its certificate's CA>"
    return "" if is_loopback(layout.listen) else " --insecure"


@app.command()
def demo(
    logs: Annotated[Path | None, typer.Option(help="Keep the processes' logs here.")] = None,
) -> None:
    """Serve the example adapters of several tenants at once, and check every answer."""
    from granatum.cli.demo import run

    sys.exit(asyncio.run(run(console, logs)))


@app.command()
def health(
    address: Annotated[str, typer.Argument(help="host:port of a router or runner.")],
    tls_ca: connection.Ca = None,
    tls_cert: connection.Cert = None,
    tls_key: connection.CertKey = None,
    insecure: connection.Insecure = False,
) -> None:
    """Exit with 0 if a router or runner serves, with 1 if not."""
    tls = Tls.given(tls_cert, tls_key, tls_ca)
    with connection.named(address):
        serving = asyncio.run(is_serving(address, tls, insecure=insecure))
    typer.echo("serving" if serving else "not serving")
    sys.exit(not serving)


@app.command(context_settings=_FOREIGN)
def router(context: typer.Context) -> None:
    """Run a router (granatum router --help)."""
    _become("granatum.router", context.args)


@app.command(context_settings=_FOREIGN)
def runner(context: typer.Context) -> None:
    """Run a runner (granatum runner --help)."""
    _become("granatum.runner", context.args)


@app.command(context_settings=_FOREIGN)
def tune(context: typer.Context) -> None:
    """Measure the kernels for a model on this GPU (granatum tune --help)."""
    _become("granatum.runner.tune", context.args)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process by a module's, if the extra that brings its libraries is installed."""
    extra = module.split(".")[1]
    if find_spec(_LIBRARIES[extra]) is None:
        raise PreconditionFailed(f"there is no {extra} here: pip install 'granatum[{extra}]'")
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606
