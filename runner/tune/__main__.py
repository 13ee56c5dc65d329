"""`granatum tune`: measure the kernels' configurations for one model on this machine's GPU."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from granatum.kernels.device import Gpu, gpu_of
from granatum.kernels.tables import tables
from granatum.models.config import ModelConfig, read_config
from granatum.runner.tune.rig import Rig
from granatum.runner.tune.search import Clock, keep, pending, search
from granatum.runner.tune.tasks import FIELDS, tasks
from granatum.runner.tune.timer import StepTimer
from granatum.v1.errors import GranatumError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def tune(
    model: Annotated[Path, typer.Option(help="A Hugging Face model's folder.")],
    device: Annotated[str, typer.Option(help="cuda or cuda:<n>.")] = "cuda",
    out: Annotated[
        Path, typer.Option(envvar="GRANATUM_TABLES", help="Where runners read tables.")
    ] = Path("~/.granatum/cache/tables"),
    max_rank: Annotated[int, typer.Option(min=1, max=256, help="The runners' --max-rank.")] = 64,
) -> None:
    """Measure how kernels are best cut for a model on this GPU, for runners to use.

    It takes minutes. What is found is written at once; a second start goes on where the first one
    ended.
    """
    where = torch.device(device)
    if where.type != "cuda" or (where.index or 0) >= torch.cuda.device_count():
        sys.exit(f"granatum tune measures a GPU, and there is no {device} here")
    torch.cuda.set_device(where.index or 0)
    try:
        config, gpu, folder = read_config(model), gpu_of(where), out.expanduser()
        tables.add(folder, gpu, FIELDS)
        fill(config, max_rank, gpu, folder, StepTimer(Rig(config, max_rank, where), gpu))
    except (GranatumError, ValueError) as error:
        sys.exit(f"granatum tune: {error}")
    print(f"the tables for {gpu.name} are in {tables.user_table(folder, gpu, 'lora').parent}")


def fill(config: ModelConfig, max_rank: int, gpu: Gpu, folder: Path, clock: Clock) -> None:
    """Measure what the user's tables lack, entry by entry, with a progress bar.

    Raises:
        ValueError: a file in `folder` is no table.
    """
    wanted = tasks(config, max_rank, gpu)
    left = pending(wanted, folder, gpu)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task(gpu.name, total=len(wanted), completed=len(wanted) - len(left))
        for task in left:
            progress.update(bar, description=f"{task.op} {task.shape}, {task.size}")
            keep(task, search(task, clock), folder, gpu)
            progress.advance(bar)


if __name__ == "__main__":
    app(prog_name="granatum tune")
