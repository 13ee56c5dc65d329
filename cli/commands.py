"""Commands over the public services: generate, adapters, runners."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from granatum.cli.connection import connected
from granatum.cli.convert import convert_adapter
from granatum.client.client import Client
from granatum.client.records import Adapter, ProofResult, RunnerStatus
from granatum.client.requests import Message, Options, Prompt
from granatum.v1.errors import InvalidRequest, PreconditionFailed

console = Console(markup=False, width=10_000)
"""A console that cuts and wraps nothing, so that names can be copied from a narrow terminal."""
adapters = typer.Typer(help="Upload and manage LoRA adapters.", no_args_is_help=True)


class _ListUnlessTold(TyperGroup):
    """`granatum runners` is `granatum runners list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` where no command stands."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runners = typer.Typer(
    cls=_ListUnlessTold, help="See and drain the fleet's runners; needs an admin key."
)

AdapterName = Annotated[
    str, typer.Argument(help="name, name@version, an alias or sha256:...", show_default=False)
]
RunnerId = Annotated[str, typer.Argument(help="Its id, as granatum runners lists it.")]


@connected
async def generate(
    client: Client,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Absent: the base model.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: float = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Absent: drawn anew.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    system: Annotated[str, typer.Option(help="A system message, with --chat.")] = "",
    template_arguments: Annotated[
        str, typer.Option(help='JSON for the template, with --chat: {"enable_thinking": false}.')
    ] = "",
    tools: Annotated[
        Path | None, typer.Option(help="A JSON file of the tools' schemas, with --chat.")
    ] = None,
    prefill: Annotated[str, typer.Option(help="How the answer begins, with --chat.")] = "",
    priority: Annotated[
        int, typer.Option(help="Higher goes first; as high as the key allows.")
    ] = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Say what it took, on stderr.")] = False,
) -> None:
    """Continue a prompt and stream the text to standard output."""
    options = Options(
        adapter=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop or (),
        priority=priority,
    )
    if not chat and (system or template_arguments or tools or prefill):
        raise typer.BadParameter(
            "--system, --template-arguments, --tools and --prefill take --chat"
        )
    if seed is not None:
        options["seed"] = seed
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        options |= _chat_options(template_arguments, tools, prefill)
    generation = client.generate(_conversation(system, text, prefill) if chat else text, **options)
    async for token in generation:
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if stats and (end := generation.end):
        rate = end.completion_tokens / max(end.total_s - end.first_token_s, 1e-9)
        typer.echo(
            f"{end.prompt_tokens} + {end.completion_tokens} tokens, first after "
            f"{end.first_token_s * 1000:.0f} ms, then {rate:.0f}/s, on {end.runner}",
            err=True,
        )


def _conversation(system: str, text: str, prefill: str) -> Prompt:
    opening = [Message("system", system)] if system else []
    answer = [Message("assistant", prefill)] if prefill else []
    return [*opening, Message("user", text), *answer]


def _chat_options(template_arguments: str, tools: Path | None, prefill: str) -> Options:
    options = Options(continue_final_message=bool(prefill))
    if template_arguments:
        options["template_arguments"] = _json(template_arguments, "--template-arguments")
    if tools is not None:
        try:
            options["tools"] = _json(tools.read_text(), "--tools")
        except OSError as error:
            raise InvalidRequest(
                f"--tools: cannot read {tools} ({error.strerror}): give a JSON file"
            ) from None
    return options


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f'{option}: no JSON ({error}): quote names with "') from None


@adapters.command("upload")
@connected
async def upload_adapter(
    client: Client,
    name: Annotated[str, typer.Argument(help="a-z, 0-9, - _ . ; at most 64.")],
    directory: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote.")],
    for_base: Annotated[
        str,
        typer.Option(help="The adapter's name for its base model, if it is the one served."),
    ] = "",
    proof: Annotated[
        Path | None,
        typer.Option(help="What the trainer saw; refused unless the fleet computes the same."),
    ] = None,
) -> None:
    """Store a PEFT adapter as the next version of NAME."""
    upload = await client.upload(name, directory, for_base=for_base, proof=proof)
    news = "uploaded" if upload.created else "unchanged, the newest version holds these bytes:"
    console.print(f"{news} {upload.adapter.full_name}  {upload.adapter.digest}")
    if proof is not None and upload.adapter.proof is not None:
        console.print(f"proven: {_distance(upload.adapter.proof)}")


@adapters.command("verify")
@connected
async def verify_adapter(
    client: Client,
    adapter: AdapterName,
    against: Annotated[Path, typer.Option(help="The proof file.", show_default=False)],
) -> None:
    """Exit with 0 if the fleet computes what the adapter's trainer saw, with 1 if not."""
    found = await client.verify(adapter, against)
    console.print(f"{'proven' if found.passed else 'not proven'}: {_distance(found.result)}")
    if not found.passed:
        raise PreconditionFailed(found.reason)


adapters.command("convert")(convert_adapter)


@adapters.command("list")
@connected
async def list_adapters(client: Client) -> None:
    """List the tenant's adapters, every version."""
    table = _table(
        *("name", "version", "aliases", "rank", "size", "published", "uploaded", "digest"),
        "trained for",
    )
    for adapter in await client.list_adapters():
        table.add_row(
            adapter.name,
            str(adapter.version),
            " ".join(adapter.aliases),
            str(adapter.max_rank),
            _size(adapter.size_bytes),
            "yes" if adapter.published else "",
            _age(adapter),
            adapter.digest.removeprefix("sha256:")[:12],
            adapter.base_model,
        )
    console.print(table)


@adapters.command("show")
@connected
async def show_adapter(client: Client, adapter: AdapterName) -> None:
    """Describe one version."""
    found = await client.get(adapter)
    table = Table.grid(padding=(0, 2))
    for field, value in (
        ("adapter", found.full_name),
        ("digest", found.digest),
        ("aliases", " ".join(found.aliases)),
        ("rank", str(found.max_rank)),
        ("modules", " ".join(found.target_modules)),
        ("trained for", found.base_model),
        ("chats", "its own template or end tokens" if found.own_chat else "as the base model"),
        ("size", _size(found.size_bytes)),
        ("uploaded", found.created.isoformat(" ", "seconds")),
        ("proof", _distance(found.proof) if found.proof else "none"),
        ("visible to", "every tenant" if found.published else f"{found.tenant} alone"),
    ):
        table.add_row(field, value)
    console.print(table)


@adapters.command("alias")
@connected
async def alias_adapter(
    client: Client,
    alias: Annotated[str, typer.Argument(help="The alias.")],
    adapter: Annotated[
        str, typer.Argument(help="name or name@version; absent with --delete.")
    ] = "",
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias.")] = False,
) -> None:
    """Point ALIAS at a version, or remove it."""
    if delete == bool(adapter):
        raise typer.BadParameter("name the adapter for the alias, or give --delete")
    if delete:
        await client.delete_alias(alias)
        console.print(f"{alias} is gone")
    else:
        found = await client.set_alias(alias, adapter)
        console.print(f"{alias} is {found.full_name}")


@adapters.command("delete")
@connected
async def delete_adapter(
    client: Client,
    adapter: Annotated[str, typer.Argument(help="name for all versions, name@version for one.")],
) -> None:
    """Delete an adapter; streams in flight finish on what they have."""
    deleted = await client.delete(adapter)
    console.print(f"{deleted} {'version' if deleted == 1 else 'versions'} deleted")


@adapters.command("publish")
@connected
async def publish_adapter(
    client: Client,
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    private: Annotated[bool, typer.Option("--undo", help="Make it private again.")] = False,
) -> None:
    """Let every tenant use an adapter, as tenant/name."""
    if private:
        await client.unpublish(name)
        console.print(f"{name} is private")
    else:
        await client.publish(name)
        console.print(f"{name} is published")


@runners.command("list")
@connected
async def list_runners(client: Client) -> None:
    """List the live runners."""
    table = _table("runner", "address", "model", "batch", "pages free", "adapters", "state")
    alive = await client.runners()
    for runner in alive:
        table.add_row(
            runner.id,
            runner.address,
            runner.model,
            f"{runner.sequences} of {runner.max_batch}",
            f"{runner.free_pages + runner.reclaimable_pages} of {runner.total_pages}",
            str(len(runner.resident_adapters)),
            _state(runner),
        )
    console.print(table)
    for runner in alive:
        if runner.trouble:
            console.print(f"{runner.id} cannot load adapters: {runner.trouble}")


@runners.command("drain")
@connected
async def drain_runner(client: Client, runner: RunnerId) -> None:
    """Place nothing more on a runner and move its streams to others."""
    await client.drain(runner)
    console.print(f"{runner} drains")


@runners.command("resume")
@connected
async def resume_runner(client: Client, runner: RunnerId) -> None:
    """Place on a drained runner again."""
    await client.resume(runner)
    console.print(f"{runner} is in use")


def _distance(proof: ProofResult) -> str:
    return (
        f"off by {proof.mean:.2g} nats on average and {proof.max:.2g} at most over {proof.tokens} "
        f"tokens; the base model alone {proof.base_mean:.2g} and {proof.base_max:.2g}; allowed "
        f"{proof.bound:.2g}, the adapter's effect {proof.effect:.2g}"
    )


def _state(runner: RunnerStatus) -> str:
    state = "drains" if runner.draining else "serves"
    return f"{state}, seen {runner.heartbeat_age_s:.1f} s ago"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _size(number: int) -> str:
    size = float(number)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _age(adapter: Adapter) -> str:
    age = datetime.now(UTC) - adapter.created
    if age.days:
        return f"{age.days} d ago"
    hours, seconds = divmod(age.seconds, 3600)
    return f"{hours} h ago" if hours else f"{seconds // 60} min ago"
