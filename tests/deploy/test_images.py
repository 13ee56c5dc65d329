"""The images and the compose file: what CI installs is what they run."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("router", "runner")
FOLDERS = (
    "adapters_store",
    "cli",
    "client",
    "examples",
    "kernels",
    "models",
    "router",
    "runner",
    "service",
)
"""The folders that have the names of their packages."""


def pip_installs(path: Path) -> list[list[str]]:
    """The arguments of every `pip install` that names our package."""
    lines = re.findall(r"-m pip install (.*)", (ROOT / path).read_text())
    return [line.split() for line in lines if '".[' in line]


def recipe(path: Path) -> tuple[list[str], str]:
    """How a file installs our package: the options without --editable, and the extra."""
    ((*options, package),) = pip_installs(path)
    extra = re.fullmatch(r'"\.\[(\w+)\]"', package)
    assert extra is not None
    return [option for option in options if option != "--editable"], extra.group(1)


@pytest.mark.parametrize("service", SERVICES)
def test_images_install_as_the_makefile_does(service: str) -> None:
    makefile, _ = recipe(Path("Makefile"))
    image, extra = recipe(Path("deploy") / f"{service}.Dockerfile")
    assert image == makefile
    assert extra == service


def test_the_makefiles_extra_holds_both_services() -> None:
    _, extra = recipe(Path("Makefile"))
    project = (ROOT / "pyproject.toml").read_text()
    assert extra == "box"
    assert 'box = ["granatum[router,runner]"' in project


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def floor(package: str) -> tuple[int, ...]:
    """The lowest version of a package that pyproject.toml allows."""
    found = re.search(rf'"{package}>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return version(found.group(1))


@pytest.mark.parametrize(
    ("stubs", "stamp", "package"),
    [
        ("*_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([0-9.]+)'", "grpcio"),
        ("*_pb2.py", r"# Protobuf Python Version: ([0-9.]+)\n", "protobuf"),
    ],
)
def test_the_lowest_versions_allowed_can_import_the_stubs(
    stubs: str, stamp: str, package: str
) -> None:
    for file in (ROOT / "protos").rglob(stubs):
        made = re.search(stamp, file.read_text())
        assert made is not None
        assert version(made[1]) <= floor(package)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def test_compose_fits_its_schema() -> None:
    command = (sys.executable, "-m", "check_jsonschema")
    schema = ("--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    checked = subprocess.run([*command, *schema], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_each_runner_has_its_own_gpu(compose: dict[str, Any]) -> None:
    runners = {n: s for n, s in compose["services"].items() if n.startswith("runner-")}
    gpus = {}
    for name, service in runners.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        gpus[name] = device["device_ids"]
        assert service["hostname"] == name, "runners advertise their host's name"
    assert gpus == {f"runner-{index}": [str(index)] for index in range(8)}


def test_services_are_watched_and_come_back(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if "tools" not in service.get("profiles", ()):
            assert service["healthcheck"]["test"], name
            assert service["restart"] == "unless-stopped", name


@pytest.mark.parametrize("service", SERVICES)
def test_compose_gives_settings_that_exist(compose: dict[str, Any], service: str) -> None:
    name = {"router": "router", "runner": "runner-0"}[service]
    command = compose["services"][name]["command"]
    assert command[0] == service
    usage = subprocess.run(
        [sys.executable, "-m", f"granatum.{service}", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    known = set(re.findall(r"--[a-z-]+", usage.stdout))
    given = {argument.split("=")[0] for argument in command[1:]}
    assert given <= known


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an image installs, unpacked."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), source], check=True)
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run([*build, "--wheel-dir", str(directory), str(source)], check=True)
    (built,) = directory.glob("granatum-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(directory / "installed")
    return directory / "installed"


@pytest.mark.parametrize("module", ["granatum.router", "granatum.cli"])
def test_the_wheel_runs_without_the_working_tree(wheel: Path, module: str) -> None:
    program = f"import runpy, sys; sys.path.insert(0, {str(wheel)!r}); sys.argv[1:] = ['--help']\n"
    program += f"runpy.run_module({module!r}, run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=wheel, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_the_wheel_carries_what_is_not_python(wheel: Path) -> None:
    """Every committed file of a package that is not left out on purpose."""
    committed = subprocess.run(
        ["git", "ls-files", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    carried = {
        str(path.relative_to(wheel / "granatum")) for path in (wheel / "granatum").rglob("*")
    }
    left_out = {name for name in committed if not name.endswith(".md")} - carried
    assert not left_out


def test_ci_runs_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ("make demo", "make test"):
        assert f"step {command}" in script
        assert command in readme
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
