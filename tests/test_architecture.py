"""The house rules of docs/architecture.md, read from the code."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS: dict[str, str] = {
    package.removeprefix("granatum."): folder
    for package, folder in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]["package-dir"].items()
}
ARROWS = {
    "v1": set[str](),
    "kernels": set[str](),
    "adapters_store": {"v1"},
    "router": {"adapters_store", "v1"},
    "runner": {"kernels", "adapters_store", "v1"},
    "client": {"v1"},
    "examples": set[str](),
}
COMPUTING = {
    *("adapter_loader", "arena", "config", "engine_child", "engine_process", "executor", "graphs"),
    *("inputs", "model", "sampler", "tokenizer", "torchless", "weights"),
}
"""Modules of the runner that may import torch or transformers; no other module may."""
TORCHLESS = (
    *(
        f"runner/{p.name}"
        for p in sorted((ROOT / "runner").glob("*.py"))
        if p.stem not in COMPUTING
    ),
    *("router", "adapters_store", "client", "protos/granatum/v1"),
)
HEAVY = ("torch", "triton", "transformers")


def test_every_package_has_its_arrows() -> None:
    assert ARROWS.keys() == FOLDERS.keys()


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_arrows(package: str) -> None:
    allowed = ARROWS[package] | {package}
    for path in sources(FOLDERS[package]):
        ours = {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "granatum"}
        if path.match("client/demo*.py"):  # the demo alone knows the examples
            ours -= {"examples"}
        assert ours <= allowed, f"{path} imports {ours - allowed}"


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
    assert talkers == {"router/registry.py"}


@pytest.mark.parametrize("place", TORCHLESS)
def test_deciding_needs_no_torch(place: str) -> None:
    for path in sources(place):
        heavy = {name.split(".")[0] for name in imports(path)} & set(HEAVY)
        assert not heavy, f"{path} imports {heavy}"


def test_kernels_is_no_regular_package() -> None:
    """With an `__init__.py` it would shadow the package `kernels` that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module", ["granatum.router.__main__", "granatum.runner.__main__", "granatum.client.cli"]
)
def test_light_processes_stay_light(module: str) -> None:
    program = f"import sys, {module}; print(*{{*sys.modules}} & {{*{HEAVY!r}}})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


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
