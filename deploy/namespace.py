"""Lay out the packages as `build/namespace/granatum/*`, links into the working tree.

With that folder on PYTHONPATH (or MYPYPATH) `import granatum...` works without an installation, as
`[tool.setuptools.package-dir]` in pyproject.toml maps it.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = ROOT / "build" / "namespace"


def main() -> None:
    """Make the links anew."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(NAMESPACE, ignore_errors=True)
    for package, folder in packages.items():
        link = NAMESPACE.joinpath(*package.split("."))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(ROOT / folder, link.parent))


if __name__ == "__main__":
    main()
