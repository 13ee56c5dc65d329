"""Where the ops are tested: each test runs on the CPU and, marked `gpu`, on a CUDA device.

On the CPU the torch twins serve, unless TRITON_INTERPRET=1 was set when pytest started: then
Triton's interpreter runs the kernels. `test_interpreter.py` runs this folder so, in a process of
its own, since Triton reads the variable when it is first imported.
"""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that a test's tensors live on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The model's dtype."""
    dtype: torch.dtype = getattr(torch, request.param)
    return dtype
