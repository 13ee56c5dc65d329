"""The command on a machine without a GPU."""

import subprocess
import sys

import pytest
import torch

from granatum.examples.tasks import BASE_MODEL


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_in_one_sentence() -> None:
    command = [sys.executable, "-m", "granatum.runner.tune", "--model", str(BASE_MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "granatum tune measures a GPU, and there is no cuda here\n"
