"""This folder once more, with the Triton kernels themselves under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from granatum.kernels.backend import HAS_TRITON, INTERPRETING


@pytest.mark.skipif(INTERPRETING or not HAS_TRITON, reason="no Triton, or already interpreting")
@pytest.mark.timeout(300)
def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(Path(__file__).parent)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
