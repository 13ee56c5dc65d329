"""This folder's files once more, with the Triton kernels themselves under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from granatum.kernels.backend import HAS_TRITON, INTERPRETING

FILES = ("attention", "layer_ops", "linear", "lora", "lora_fused", "sampling")


@pytest.mark.skipif(INTERPRETING or not HAS_TRITON, reason="no Triton, or already interpreting")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str) -> None:
    file = Path(__file__).with_name(f"test_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_every_file_of_kernels_is_among_them() -> None:
    found = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert found == {*FILES, "interpreter", "compile"}  # which need no interpreter
