"""A linear of the base model whose weight is stored as it is multiplied."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from granatum.kernels.backend import require, require_rows
from granatum.kernels.linear.linear import Workspace, launch_linear
from granatum.kernels.linear.tuning import ROWS, block_rows, config_for


@dataclass(frozen=True, slots=True)
class Dense:
    """y = x W^T + b; a `contract.Linear`.

    weight: [N, K], contiguous; bias: [N] or None;
    workspace: of `contract.allocate_workspace`; None in `Weights`; set by `within`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    workspace: Workspace | None = None

    def within(self, workspace: Workspace) -> "Dense":
        """The linear with room for its partial sums."""
        return replace(self, workspace=workspace)

    def apply(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b [M, N]; x [M, K]. New, of x's dtype, or `out`, of x's dtype or float32.

        Raises:
            ValueError: a shape, stride or dtype that the kernel cannot take.
        """
        config = config_for(x.shape[0], self.weight)
        if config is None:
            if out is None:
                return functional.linear(x, self.weight, self.bias)
            return self._multiply(x, out)
        require_rows("x", x, (x.shape[0], self.weight.shape[1]))
        require(self.weight.is_contiguous(), "the weight must be contiguous")
        require(x.dtype == self.weight.dtype, f"x is {x.dtype}, the weight {self.weight.dtype}")
        assert self.workspace is not None, "a linear is applied `within` a workspace"
        return launch_linear(x, self.weight, self.bias, self.workspace, config, out)

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The library's product, in `out`."""
        if x.dtype == out.dtype:
            torch.mm(x, self.weight.t(), out=out)
        elif x.is_cuda:
            torch.mm(x, self.weight.t(), out.dtype, out=out)
        else:  # a CPU's library multiplies one dtype alone
            torch.mm(x.to(out.dtype), self.weight.t().to(out.dtype), out=out)
        return out if self.bias is None else out.add_(self.bias)

    def apply_onto(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += x W^T, without the bias; x [M, K], y [M, N]."""
        torch.addmm(y, x, self.weight.t(), out=y)

    def may_overlap(self, rows: int) -> bool:
        """Whether a kernel that needs x alone may run beside `apply` of `rows` rows.

        Our own kernel allows it: it waits for x before it lets another kernel start.
        """
        return config_for(rows, self.weight) is not None

    def workspace_elements(self, rows: int) -> tuple[int, int]:
        """Partial sums and arrivals that `apply` needs for up to `rows` rows."""
        partials, arrivals = 0, 0
        for some in (min(most, rows) for most in ROWS):
            config = config_for(some, self.weight)
            if config is not None and config.splits > 1:
                sums = block_rows(some) * self.weight.shape[0] * config.splits
                partials = max(partials, sums)
                arrivals = max(arrivals, self.weight.shape[0] // config.block_n)
        return partials, arrivals
