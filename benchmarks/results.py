"""A results file: what was measured, by which command, of which code, on what."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

_PACKAGES = ("torch", "triton", "grpcio", "numpy")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark can be told."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="of the code measured, where git cannot tell")
    parser.add_argument("--out", type=Path, help="JSON file of the results")


def environment(args: argparse.Namespace) -> Row:
    """What results are made with."""
    on_gpu = args.device == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": args.commit or _commit(),
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


class Results:
    """One run's rows, written after each, so that an interrupted run keeps what it has.

    The file holds the run, `{command, commit, gpu, versions, rows}`, and under `earlier` those
    before it, less their rows of the same `key`: a file may be made in several runs.
    """

    def __init__(self, args: argparse.Namespace, key: tuple[str, ...]) -> None:
        self._path: Path | None = args.out
        self._key = key
        self._run: Row = {**environment(args), "rows": []}
        self._earlier = _runs(self._path)

    @property
    def rows(self) -> list[Row]:
        """Of this run."""
        rows: list[Row] = self._run["rows"]
        return rows

    @property
    def all_rows(self) -> list[Row]:
        """Of this run, then of earlier ones."""
        return [*self.rows, *(row for run in self._earlier for row in run["rows"])]

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        print(json.dumps(row), flush=True)
        self.rows.append(row)
        for run in self._earlier:
            run["rows"] = [old for old in run["rows"] if self._name(old) != self._name(row)]
        self._earlier = [run for run in self._earlier if run["rows"]]
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            earlier = {"earlier": self._earlier} if self._earlier else {}
            self._path.write_text(json.dumps({**self._run, **earlier}, indent=1) + "\n")

    def print_table(self, columns: tuple[str, ...]) -> None:
        """The rows in brief."""
        table = [[*self._key, *columns]]
        table += [[_shown(row, name) for name in table[0]] for row in self.rows]
        filled = [i for i in range(len(table[0])) if any(line[i] for line in table[1:])]
        widths = [max(len(line[i]) for line in table) for i in filled]
        for line in table:
            print("  ".join(line[i].ljust(w) for i, w in zip(filled, widths, strict=True)))

    def _name(self, row: Mapping[str, Any]) -> list[Any]:
        return [row.get(name) for name in self._key]


def read_rows(path: Path) -> list[Row]:
    """The rows of all runs."""
    return [row for run in _runs(path) for row in run["rows"]]


def _runs(path: Path | None) -> list[Row]:
    if path is None or not path.is_file():
        return []
    latest: Row = json.loads(path.read_text())
    earlier: list[Row] = latest.pop("earlier", [])
    return [*earlier, latest]


def _shown(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
