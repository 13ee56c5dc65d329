"""The house rules of docs/architecture.md, read from the code."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = {
    package.removeprefix("granatum."): folder
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
}
ARROWS = {
    "v1": set[str](),
    "service": {"v1"},
    "kernels": set[str](),
    "models": {"v1"},
    "adapters_store": {"models", "v1"},
    "router": {"adapters_store", "models", "service", "v1"},
    "runner": {"adapters_store", "kernels", "models", "service", "v1"},
    "client": {"v1"},
    "cli": {"client", "v1"},
    "examples": set[str](),
}
DOORS = {
    "cli/demo*.py": {"examples"},
    "cli/keys.py": {"router"},
    "cli/box/box.py": {"models", "router"},
}
"""What some files may import besides: the demo its examples, the command line the keys file, and
the box what a model's folder is."""
COMPUTING = (
    "kernels",
    "runner/model",
    "runner/engine/execution",
    "runner/engine/process.py",
    "runner/tune",
)
"""The rooms that may import torch, and the process that wires them."""
LATE = {
    "cli/convert.py": {"torch"},
    "runner/text/tokenizer_files.py": {"transformers"},
    "runner/text/templates/server.py": {"transformers"},
    "runner/text/torchless.py": {"transformers"},
    "runner/engine/child.py": {"torch"},
}
"""What else may import a heavy library: within a function, or in a process that has need of it."""
LEVELS = 4
"""The longest chain of imports among the files of one folder."""
LINES = 350
"""The most lines of a file that is written by hand."""
HEAVY = ("torch", "triton", "transformers")


def test_every_package_has_its_arrows() -> None:
    assert ARROWS.keys() == FOLDERS.keys()


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_arrows(package: str) -> None:
    allowed = ARROWS[package] | {package}
    for path in sources(FOLDERS[package]):
        ours = {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "granatum"}
        ours -= {room for file, rooms in DOORS.items() if path.match(file) for room in rooms}
        assert ours <= allowed, f"{path} imports {ours - allowed}"


def test_the_command_line_knows_nothing_of_the_router_but_the_keys_file() -> None:
    found = {name for path in sources("cli") for name in imports(path) if "granatum.router" in name}
    assert found
    assert all(f"{name}.".startswith("granatum.router.services.keys_file.") for name in found)


def test_nothing_is_imported_relatively_or_past_the_namespace() -> None:
    outside = {folder.split("/")[0] for folder in FOLDERS.values()}
    for folder in FOLDERS.values():
        for path in sources(folder):
            for name in imports(path):
                assert not name.startswith("."), f"{path}: {name}"
                assert name.split(".")[0] not in outside, f"{path}: {name}, not granatum.{name}"


def test_only_the_registry_talks_to_redis() -> None:
    talkers = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS.values()
        for path in sources(folder)
        if {"redis", "valkey"} & {name.split(".")[0] for name in imports(path)}
    }
    assert talkers == {"router/placement/registry.py"}


def test_deciding_needs_no_torch() -> None:
    for folder in FOLDERS.values():
        for path in sources(folder):
            name = path.relative_to(ROOT)
            if folder == "examples" or any(name.is_relative_to(room) for room in COMPUTING):
                continue
            heavy = {found.split(".")[0] for found in imports(path)} & set(HEAVY)
            assert heavy <= LATE.get(str(name), set()), f"{name} imports {heavy}"


def test_every_folder_of_code_is_packaged() -> None:
    packaged = set(PROJECT["tool"]["setuptools"]["packages"])
    for package, folder in FOLDERS.items():
        for path in sources(folder):
            inner = path.parent.relative_to(ROOT / folder).parts
            assert ".".join(("granatum", package, *inner)) in packaged, path


def test_a_reader_of_a_folder_follows_few_levels_of_imports() -> None:
    for package, folder in FOLDERS.items():
        for room in {path.parent for path in sources(folder)}:
            prefix = ".".join(("granatum", package, *room.relative_to(ROOT / folder).parts))
            chain = longest_chain(room, prefix)
            assert len(chain) <= LEVELS, f"{room}: {' <- '.join(chain)}"


def test_every_file_is_short() -> None:
    for folder in (*FOLDERS.values(), "benchmarks", "deploy", "tests"):
        for path in sources(folder):
            lines = len(path.read_text().splitlines())
            assert lines <= LINES, f"{path}: {lines} lines"


def test_kernels_is_no_regular_package() -> None:
    """With an `__init__.py` it would shadow the package `kernels` that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module", ["granatum.router.__main__", "granatum.runner.__main__", "granatum.cli.main"]
)
def test_light_processes_stay_light(module: str) -> None:
    assert loaded_by(module, HEAVY) == []


@pytest.mark.parametrize(
    "module", ["adapters_store.store", "models.identity", "runner.engine.engine", "v1.validation"]
)
def test_what_is_no_service_needs_no_grpc(module: str) -> None:
    assert loaded_by(f"granatum.{module}", ("grpc",)) == []


def test_the_client_needs_grpcio_and_protobuf_alone() -> None:
    others = ("numpy", "obstore", "pydantic", "redis", "rich", "structlog", "typer")
    assert loaded_by("granatum.client", (*others, *HEAVY)) == []


def loaded_by(module: str, suspects: tuple[str, ...]) -> list[str]:
    """Which of the suspects a process loads when it imports the module."""
    program = f"import sys, {module}; print(*{{*sys.modules}} & {{*{suspects!r}}})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return loaded.stdout.split()


def sources(place: str) -> Iterator[Path]:
    """The hand-written Python files of a folder, or the one file."""
    path = ROOT / place
    for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        if not source.stem.endswith(("_pb2", "_pb2_grpc")):
            yield source


def imports(path: Path) -> Iterator[str]:
    """Every module or name that a file imports, in full: `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (f"{start}.{alias.name}" for alias in node.names)


def longest_chain(room: Path, prefix: str) -> list[str]:
    """The longest chain of imports among the files of a folder, the importer last."""
    names = {path.stem for path in room.glob("*.py")} - {"__init__"}

    def needs(name: str) -> set[str]:
        """The files of the folder that this one imports."""
        inner = {
            found.removeprefix(f"{prefix}.").split(".")[0]
            for found in imports(room / f"{name}.py")
            if found.startswith(f"{prefix}.")
        }
        return inner & names - {name}

    @cache
    def chain(name: str) -> list[str]:
        return [*max(map(chain, needs(name)), key=len, default=[]), name]

    return max(map(chain, names), key=len, default=[])
