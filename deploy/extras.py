"""Install the package with each extra alone, and import all that the extra promises.

    python deploy/extras.py

Each extra is installed as `constraints.txt` pins it. The package alone, the router and the box
are then installed at the lower bound of each dependency, and the box of these versions runs the
demo. This comes before the next extra, since what the next one brings may refuse the lower bounds.
torch and its triton stay as pinned there, for the size of torch's wheel.

An environment may hold several extras, one after another: each of them includes the one before, so
that what is installed is what the extra alone brings. Needs pip and setuptools, and torch's wheel.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = (("", "cli", "router"), ("runner", "box"))
"""Extras by environment; "" is the package without any."""
LOWEST = ("", "router", "box")
"""Extras that are installed a second time, at their lower bounds."""
PINS = ROOT / "constraints.txt"
ROOMS = {
    "": ("client", "v1"),
    "cli": ("cli",),
    "router": ("adapters_store", "models", "router", "service"),
    "runner": ("adapters_store", "cli", "kernels", "models", "runner", "service"),
    "box": ("router",),
}
"""What can be imported with an extra, besides the rooms of those that it includes."""
IMPORT = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"


def main() -> None:
    """Check every extra. Ends with the first command that fails."""
    folders = _folders()
    with tempfile.TemporaryDirectory(prefix="granatum-extras-") as place:
        wheel = _wheel(Path(place))
        for number, extras in enumerate(ENVIRONMENTS):
            environment = Path(place) / str(number)
            venv.create(environment, with_pip=False)
            for extra in extras:
                _check(environment, wheel, extra, _modules(folders, ROOMS[extra]), PINS)
                if extra in LOWEST:
                    lowest = Path(place) / "lowest.txt"
                    lowest.write_text("\n".join(lower_bounds(extra)))
                    _check(environment, wheel, extra, _modules(folders, ROOMS[extra]), lowest)
            if "box" in extras:
                subprocess.run([environment / "bin" / "granatum", "demo"], check=True)
            shutil.rmtree(environment)


def lower_bounds(extra: str) -> list[str]:
    """The lower bound of each dependency of an extra, as pip's constraints; torch as pinned."""
    project = _pyproject()["project"]
    lines = [*project["dependencies"], *_dependencies(project, extra)]
    bounds = dict(_bound(line) for line in lines)  # an extra's own bound stands after the package's
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", PINS.read_text(), re.MULTILINE))
    bounds |= {name: pins[name] for name in ("torch", "triton") if name in bounds}
    return [f"{name}=={version}" for name, version in bounds.items()]


def _dependencies(project: Any, extra: str) -> Iterator[str]:
    """The lines of an extra, and before them those of the extras that it includes."""
    for line in project["optional-dependencies"].get(extra, ()):
        if included := re.fullmatch(r"granatum\[(.+)\]", line):
            for name in included[1].split(","):
                yield from _dependencies(project, name)
        else:
            yield line


def _bound(line: str) -> tuple[str, str]:
    found = re.match(r"([\w-]+)>=([\w.]+)", line)
    assert found is not None, f"{line} has no lower bound"
    return found[1], found[2]


def _pyproject() -> Any:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def _folders() -> dict[str, Path]:
    """The rooms' folders by their names."""
    packages = _pyproject()["tool"]["setuptools"]["package-dir"]
    return {name.removeprefix("granatum."): ROOT / path for name, path in packages.items()}


def _wheel(place: Path) -> Path:
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # what an earlier build left there
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(ROOT))
    (wheel,) = place.glob("granatum-*.whl")
    return wheel


def _modules(folders: dict[str, Path], rooms: tuple[str, ...]) -> list[str]:
    """Every module of these rooms by its full name."""
    return [
        ".".join(("granatum", room, *path.relative_to(folders[room]).with_suffix("").parts))
        for room in rooms
        for path in sorted(folders[room].rglob("*.py"))
        if path.name != "__init__.py"
    ]


def _check(
    environment: Path, wheel: Path, extra: str, modules: list[str], constraints: Path
) -> None:
    began = time.monotonic()
    python = str(environment / "bin" / "python")
    name = f"granatum[{extra}]" if extra else "granatum"
    package = f"{wheel}[{extra}]" if extra else str(wheel)
    _pip("--python", python, "install", "--no-compile", "--constraint", str(constraints), package)
    subprocess.run([python, "-I", "-c", IMPORT, *modules], check=True)
    has_typer = any(environment.glob("lib/*/site-packages/typer"))  # of this extra or another
    _check_command(environment / "bin" / "granatum", installed=has_typer)
    took = time.monotonic() - began
    by = f"{name:<17} by {constraints.name:<15}"
    print(f"{by} imports {len(modules)} modules, {took:.0f} s", flush=True)


def _check_command(command: Path, *, installed: bool) -> None:
    """With an extra the command helps; without one its one line says what to install."""
    ran = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    if installed:
        assert ran.returncode == 0, ran.stderr
    else:
        assert ran.returncode == 1, ran.stdout
        (line,) = ran.stderr.splitlines()
        assert "pip install 'granatum[cli]'" in line, line


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


if __name__ == "__main__":
    main()
