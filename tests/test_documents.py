"""What documents name is there: files, folders, commands, flags, targets, reasons, log lines.

So are the files that comments and docstrings of the code name.
"""

import io
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from granatum.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "examples/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
TREE = [
    path.relative_to(ROOT)
    for top in (*ROOT.glob("[a-z]*"), ROOT / ".ci")
    if top.name != "build"
    for path in ([top, *top.rglob("*")] if top.is_dir() else [top])
]
CODE = (".py", ".lua", ".proto")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = tuple(PROJECT["tool"]["setuptools"]["package-dir"].values())
FOREIGN = {"O_DIRECT"}
"""Names that other programs gave."""
PROMISED_LINES = "## Log lines that matter"
MAP = "## Where things are"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    names = {path.name for path in TREE}
    rooms = {path.parts[0] for path in TREE if len(path.parts) > 1}
    for span in spans(document):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) is None:
            continue
        if "/" in span and (span.split("/")[0] in rooms or span.endswith(CODE)):
            assert (ROOT / span).exists(), span
        elif span.endswith(CODE):
            assert span in names, span


def test_files_that_comments_name_exist() -> None:
    paths = [f"/{path.as_posix()}" for path in TREE]
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"[\w./-]*\w\.(?:py|lua|proto|md)\b", comments(file)):
                assert any(path.endswith(f"/{name}") for path in paths), f"{file}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_commands_have_the_flags_they_are_given(document: str) -> None:
    for words in commands(document):
        own, _, runners = " ".join(words).partition(" -- ")
        assert flags(own) <= options(words), words
        assert flags(runners) <= options(["runner"]), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_that_are_named_alone_exist(document: str) -> None:
    known = flags(sources("benchmarks"))
    for name in ("router", "runner", "tune", "up", "generate", "health", "keys add"):
        known |= options(name.split())
    for span in spans(document):
        if span.startswith("--"):
            assert flags(span) <= known, span


@pytest.mark.parametrize("document", DOCUMENTS)
def test_benchmarks_have_the_flags_they_are_given(document: str) -> None:
    known = flags(sources("benchmarks"))
    for line in [*spans(document), *blocks(document)]:
        if line.startswith("python benchmarks/"):
            assert (ROOT / line.split()[1]).exists(), line
            assert flags(line) <= known, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in [*spans(document), *blocks(document)]:
        if line.startswith("make "):
            assert line.split()[1] in targets, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_capitals_exist(document: str) -> None:
    code = sources(*FOLDERS, "docker-compose.yml")
    for span in spans(document):
        if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", span) is None or span in FOREIGN:
            continue
        setting = re.fullmatch(r"GRANATUM_(ROUTER|RUNNER)_(\w+)", span)
        if setting is not None:
            flag = f"--{setting[2].lower().replace('_', '-')}"
            assert flag in options([setting[1].lower()]), span
        else:
            assert span in code or span.title().replace("_", "") in code, span


def test_the_log_lines_of_the_operations_page_are_written() -> None:
    code = sources(*FOLDERS)
    table = section("docs/operations.md", PROMISED_LINES)
    events = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))
    assert events
    for event in events:
        assert re.search(rf'"{re.escape(event)}[" ]', code), event


def test_the_map_has_every_folder_of_code() -> None:
    folders = set()
    for folder in FOLDERS:
        folders |= {
            path.parent.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")
        }
    mapped, top = set(), ""
    rows = re.findall(
        r"^\| (&nbsp;)*`([^`]+)/`", section("docs/architecture.md", MAP), re.MULTILINE
    )
    for inner, name in rows:
        top = top if inner else name
        mapped.add(f"{top}/{name}" if inner else name)
    assert folders <= mapped
    assert all((ROOT / folder).is_dir() for folder in mapped)


def section(document: str, title: str) -> str:
    """From a heading to the next one of its level."""
    return (ROOT / document).read_text().partition(f"{title}\n")[2].partition("\n## ")[0]


@cache
def spans(document: str) -> list[str]:
    """What stands between backquotes in running text."""
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def blocks(document: str) -> list[str]:
    """Lines of code blocks, continued ones joined, without comments."""
    text = "\n".join(re.findall(r"```.*?\n(.*?)```", (ROOT / document).read_text(), re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


def commands(document: str) -> Iterator[list[str]]:
    """Every `granatum ...`, as its words after that."""
    for line in [*spans(document), *blocks(document)]:
        command = re.match(r"(?:[A-Z_]+=\S+ )*granatum ([a-z].*)", line)
        if command is not None:
            yield shlex.split(command[1])


def flags(text: str) -> set[str]:
    """What looks like a flag."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def options(words: list[str]) -> set[str]:
    """The flags of the command that `words` begin with."""
    command = typer.main.get_command(app)
    for depth, word in enumerate(words):
        if not isinstance(command, TyperGroup):
            break
        assert word in command.commands, f"granatum {' '.join(words)}"
        command = command.commands[word]
        if command.context_settings.get("ignore_unknown_options"):  # another program takes over
            return flags(help_of(*words[: depth + 1]))
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


@cache
def help_of(*words: str) -> str:
    """What the command prints of itself."""
    command = [sys.executable, "-m", "granatum.cli", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def comments(file: Path) -> str:
    """All comments and docstrings of a Python file."""
    statements = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        starts = before in statements and token.type == tokenize.STRING
        if starts or token.type == tokenize.COMMENT:
            found.append(token.string)
        elif token.type != tokenize.NL:
            before = token.type
    return "\n".join(found)


@cache
def sources(*places: str) -> str:
    """All text of the code in some folders, or files."""
    paths = [
        path
        for place in places
        for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*"))
        if path.suffix in (*CODE, ".yml")
    ]
    return "\n".join(path.read_text() for path in paths)
