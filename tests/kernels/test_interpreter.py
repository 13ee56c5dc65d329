"""The tests of every op once more, with the Triton kernels under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from granatum.kernels.backend import HAS_TRITON, INTERPRETING

FOLDER = Path(__file__).parent
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/test_*.py"))


@pytest.mark.skipif(INTERPRETING or not HAS_TRITON, reason="no Triton, or already interpreting")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_kernels_under_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for_a_gpu_alone = pytest.ExitCode.NO_TESTS_COLLECTED
    assert done.returncode in (0, for_a_gpu_alone), done.stdout[-4000:]
