"""What was measured to be faster than the kernels' defaults: by GPU, op, shape and size.

    <folder>/<op>.json    {"gpu": name, "shapes": {shape: {size: differences}}}

`shape` is an op's name for a shape and its dtype. `size` is what the op is also cut by: the largest
rank for LoRA, the rows of a block for a linear. `differences` are the fields of a configuration
that differ from the default; null says that the default was the fastest.

The tables beside this file are the packaged ones; `gpus.json` says which GPUs each folder
serves. A user's tables, made by `granatum tune`, add to them and win over them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from granatum.kernels.device import Gpu

Differences = Mapping[str, Any]
"""Values are integers or booleans."""
Shapes = dict[str, dict[int, Differences | None]]
"""Of one op on one GPU: by shape, then by size."""

_PACKAGED = Path(__file__).parent
_MOST = 1 << 20
"""The largest value of a field."""
_users: dict[tuple[str, str], Shapes] = {}
"""By the GPU's name and the op: what was added in this process."""
_forget: list[Callable[[], None]] = []
"""What empties the memory of every `remembered` function."""
_Lookup = TypeVar("_Lookup", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class OpFields:
    """What a table may say of an op.

    types:  the fields of the op's configuration, `int` or `bool`;
    needed: the fields without a default: an entry must name them all.
    """

    types: Mapping[str, type]
    needed: frozenset[str] = frozenset()

    def checked(self, differences: Differences | None) -> Differences | None:
        """The differences, if the op can take them.

        Raises:
            ValueError: naming a field that is unknown, missing or out of range.
        """
        if differences is None:
            return None
        for field, value in differences.items():
            known = type(value) is self.types.get(field)
            if not known or (type(value) is int and not 1 <= value <= _MOST):
                raise ValueError(f"{field} = {value!r} is nothing that a kernel takes")
        if missing := self.needed - differences.keys():
            raise ValueError(f"{min(missing)} is missing")
        return dict(differences)


def remembered(lookup: _Lookup) -> _Lookup:
    """Cache a function of the tables; the cache is emptied when the tables change."""
    answer = cache(lookup)
    _forget.append(answer.cache_clear)
    return cast(_Lookup, answer)


def find(gpu: Gpu, op: str, shape: str, size: int) -> Differences | None:
    """What differs from the default at the nearest measured size: `size`, else above, else below.

    None if the default serves, because nothing was measured or because the default was the fastest.
    """
    by_size = _measured(gpu, op).get(shape, {}) | _users.get((gpu.name, op), {}).get(shape, {})
    nearest = min(by_size, key=lambda n: (n < size, abs(n - size)), default=None)
    return None if nearest is None else by_size[nearest]


def is_measured(gpu: Gpu, op: str, shape: str) -> bool:
    """Whether this shape was measured on this GPU, at any size."""
    return shape in _measured(gpu, op) or shape in _users.get((gpu.name, op), {})


def put(gpu: Gpu, op: str, shape: str, size: int, differences: Differences | None) -> None:
    """Have this process use `differences` for a shape and size."""
    _users.setdefault((gpu.name, op), {}).setdefault(shape, {})[size] = differences
    _changed()


def remove(gpu: Gpu, op: str, shape: str, size: int) -> None:
    """Undo `put`."""
    del _users[gpu.name, op][shape][size]
    _changed()


def add(folder: Path, gpu: Gpu, fields: Mapping[str, OpFields]) -> None:
    """Have this process use the user's tables for `gpu` in `folder`, as far as there are any.

    `fields` names the ops, and what differences may say.

    Raises:
        ValueError: a file is no table, or gives a field a value that the op cannot take.
    """
    for op, known in fields.items():
        path = user_table(folder, gpu, op)
        if path.exists():
            for shape, by_size in read(path, known).items():
                for size, differences in by_size.items():
                    put(gpu, op, shape, size, differences)


def user_table(folder: Path, gpu: Gpu, op: str) -> Path:
    """Where a user's table of an op lies."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return folder / name / f"{op}.json"


def read(path: Path, known: OpFields) -> Shapes:
    """A table.

    Raises:
        ValueError: the file is no table, or gives a field a value that the op cannot take.
    """
    try:
        content = json.loads(path.read_text())
        shapes: Shapes = {
            shape: {_size(size): known.checked(found) for size, found in by_size.items()}
            for shape, by_size in content["shapes"].items()
        }
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of configurations: {error}") from error
    return shapes


def write(path: Path, gpu: Gpu, shapes: Shapes) -> None:
    """Replace a table at once, so that a reader finds the old or the new one; a line per shape."""
    lines = ",\n".join(
        f"  {json.dumps(shape)}: {json.dumps(dict(sorted(by_size.items())))}"
        for shape, by_size in sorted(shapes.items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".new")
    made.write_text(f'{{"gpu": {json.dumps(gpu.name)}, "shapes": {{\n{lines}\n}}}}\n')
    made.replace(path)


def _changed() -> None:
    for forget in _forget:
        forget()


def _measured(gpu: Gpu, op: str) -> Shapes:
    keys = (key for key in _gpus() if re.search(rf"\b{re.escape(key)}\b", gpu.name))
    key = max(keys, key=len, default=None)
    return {} if key is None else _packaged(_gpus()[key], op)


@cache
def _gpus() -> dict[str, str]:
    """The folders of the tables, by whole words of the GPU's name. The longest key wins."""
    folders: dict[str, str] = json.loads((_PACKAGED / "gpus.json").read_text())
    return folders


@cache
def _packaged(folder: str, op: str) -> Shapes:
    path = _PACKAGED / folder / f"{op}.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    return {
        shape: {int(size): found for size, found in by_size.items()}
        for shape, by_size in content["shapes"].items()
    }


def _size(text: str) -> int:
    if (size := int(text)) < 1:
        raise ValueError(f"there is no size {size}")
    return size
