"""`granatum keys`: make, list and revoke tenants' and admins' keys in a keys file."""

from pathlib import Path
from typing import Annotated

import typer

from granatum.router.services import keys_file
from granatum.router.services.keys_file import Identity

keys = typer.Typer(help="Make and revoke tenants' and admins' keys.", no_args_is_help=True)

File = Annotated[Path, typer.Option(help="The keys file; routers read it again when it changes.")]


@keys.command()
def add(
    file: File,
    tenant: Annotated[str | None, typer.Option(help="The tenant that the key names.")] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="A key for operators: it sees and drains runners.")
    ] = False,
    max_priority: Annotated[
        int, typer.Option(help="The highest priority that requests with this key may ask for.")
    ] = 0,
) -> None:
    """Make a key and print it, once. The file is made if need be, in a folder that is there."""
    if admin == (tenant is not None):
        raise typer.BadParameter("give either --tenant NAME or --admin")
    typer.echo(keys_file.add(file, Identity(tenant, max_priority)))


@keys.command("list")
def list_keys(file: File) -> None:
    """Print the first digits of each key's digest, and whom the key names."""
    for digest, identity in keys_file.read(file).items():
        typer.echo(f"{digest[:16]} {identity}")


@keys.command()
def revoke(
    file: File,
    digest: Annotated[str, typer.Argument(help="Its first 8 digits or more, as list prints them.")],
) -> None:
    """Remove a key."""
    keys_file.revoke(file, digest)
    typer.echo(f"{digest} is revoked")
