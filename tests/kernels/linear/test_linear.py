"""The linear of few rows against float64."""

import pytest
import torch

from granatum.kernels.backend import INTERPRETING, runs_kernel
from granatum.kernels.linear.contract import allocate_workspace
from granatum.kernels.linear.dense import Dense
from granatum.kernels.linear.linear import (
    Workspace,
    launch_linear,
)
from granatum.kernels.linear.tuning import MAX_ROWS, Config

BFLOAT16 = 2e-2 if INTERPRETING else 1e-2  # the interpreter cuts off what rounding would keep
TOLERANCE = {torch.bfloat16: BFLOAT16, torch.float16: 2e-3, torch.float32: 1e-5}
OUT, IN = 128, 320
CONFIGS = [
    Config(64, 64, 1, 4, 3),
    Config(64, 32, 3, 4, 4),
    Config(64, 64, 2, 4, 2),
]


@pytest.fixture
def workspace(device: torch.device) -> Workspace:
    if not runs_kernel(torch.empty(0, device=device)):
        pytest.skip("the library serves")
    workspace = Workspace.of_size(MAX_ROWS * 4 * OUT, OUT, device)
    workspace.partials.fill_(torch.nan)
    return workspace


def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cut_gives_the_product(
    rows: int, config: Config, dtype: torch.dtype, device: torch.device, workspace: Workspace
) -> None:
    x = torch.randn(rows, 2 * IN, device=device).to(dtype)[:, :IN]
    weight = (IN**-0.5 * torch.randn(OUT, IN, device=device)).to(dtype)
    for bias in (None, torch.randn(OUT, device=device).to(dtype)):
        if bias is None and rows == 1:
            continue
        y = launch_linear(x, weight, bias, workspace, config)
        tolerance = TOLERANCE[dtype]
        expected = truth(x, weight, bias)
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("config", [*CONFIGS, None], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_float32_results_keep_the_sums(
    biased: bool, config: Config | None, dtype: torch.dtype, device: torch.device,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """By every cut, and by the library."""
    x = torch.randn(5, 2 * IN, device=device).to(dtype)[:, :IN]
    weight = (IN**-0.5 * torch.randn(OUT, IN, device=device)).to(dtype)
    bias = torch.randn(OUT, device=device).to(dtype) if biased else None
    out = torch.full((5, OUT), torch.nan, device=device)
    if config is None:
        dense = Dense(weight, bias)
        y = dense.within(allocate_workspace(5, [dense], device)).apply(x, out)
    else:
        workspace = request.getfixturevalue("workspace")
        y = launch_linear(x, weight, bias, workspace, config, out)
    assert y is out
    torch.testing.assert_close(out.double(), truth(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_row_is_bit_identical_in_any_company(
    config: Config, device: torch.device, workspace: Workspace
) -> None:
    x, weight = torch.randn(20, IN, device=device), torch.randn(OUT, IN, device=device)
    x, weight = x.bfloat16(), weight.bfloat16()
    crowd = launch_linear(x, weight, None, workspace, config)
    other = torch.randn_like(x)
    other[7] = x[7]
    assert torch.equal(launch_linear(other, weight, None, workspace, config)[7], crowd[7])


@pytest.mark.parametrize("biased", [False, True])
def test_the_library_serves_where_nothing_was_measured(biased: bool, device: torch.device) -> None:
    x, weight = torch.randn(3, IN, device=device), torch.randn(OUT, IN, device=device)
    dense = Dense(weight, torch.randn(OUT, device=device) if biased else None)
    dense = dense.within(allocate_workspace(3, [dense], device))
    y = dense.apply(x)
    assert not dense.may_overlap(3)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, dense.bias))
    before = torch.randn_like(y)
    summed = before.clone()
    dense.apply_onto(summed, x)
    expected = before.double() + truth(x, weight, None)
    torch.testing.assert_close(summed.double(), expected, rtol=1e-5, atol=1e-5)


def test_refusals(device: torch.device, workspace: Workspace) -> None:
    x, weight = torch.randn(3, IN, device=device), torch.randn(OUT, IN, device=device)
    with pytest.raises(ValueError, match="does not divide"):
        launch_linear(x, weight, None, workspace, Config(64, 128, 1, 4, 3))
    small = Workspace.of_size(0, 0, device)
    with pytest.raises(ValueError, match="partial sums"):
        launch_linear(x, weight, None, small, Config(64, 64, 2, 4, 3))
    for out, why in (
        (torch.empty(3, OUT - 1), "y must be"),
        (torch.empty(3, OUT).half(), "float32"),
    ):
        with pytest.raises(ValueError, match=why):
            launch_linear(x, weight, None, workspace, Config(64, 64, 1, 4, 3), out.to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_replayed_chains_of_overlapping_launches(config: Config) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda")
    workspace = Workspace.of_size(MAX_ROWS * 4 * IN, IN, device)
    weights = [IN**-0.5 * torch.randn(IN, IN, device=device) for _ in range(24)]
    weights = [weight.half() for weight in weights]
    x = torch.empty(20, IN, device=device, dtype=torch.half)

    def run() -> torch.Tensor:
        y = x
        for weight in weights:
            y = launch_linear(y, weight, None, workspace, config)
        return y

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(5):
        x.normal_()
        graph.replay()
        expected = x.double()
        for weight in weights:
            expected = (expected @ weight.double().T).half().double()
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
