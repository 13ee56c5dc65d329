"""What the model and the LoRA ops need of a linear, however its weight is stored."""

from collections.abc import Iterable
from typing import Protocol

import torch

from granatum.kernels.linear.linear import Workspace


class Linear(Protocol):
    """y = x W^T + b of K features to N. x [M, K] has adjacent elements in a row."""

    @property
    def bias(self) -> torch.Tensor | None:
        """b [N], or None."""
        ...

    def within(self, workspace: Workspace) -> "Linear":
        """The linear with room for its partial sums; it is applied only so."""
        ...

    def apply(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b [M, N], of x's dtype and new; or in `out`, of x's dtype or float32.

        Sums are float32 and are rounded to the dtype of the result, so float32 keeps them whole.
        Raises ValueError for a shape, stride or dtype it cannot take.
        """
        ...

    def apply_onto(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += x W^T, without the bias; y [M, N]."""
        ...

    def may_overlap(self, rows: int) -> bool:
        """Whether a kernel that needs x alone may run beside `apply` of `rows` rows.

        The linear's kernel must then wait for x before it lets another kernel start.
        """
        ...

    def workspace_elements(self, rows: int) -> tuple[int, int]:
        """Partial sums and arrivals that `apply` needs for up to `rows` rows."""
        ...


def allocate_workspace(rows: int, linears: Iterable[Linear], device: torch.device) -> Workspace:
    """Room in which each of `linears` can be applied to up to `rows` rows, one after another."""
    partials, arrivals = 0, 0
    for linear in linears:
        own = linear.workspace_elements(rows)
        partials, arrivals = max(partials, own[0]), max(arrivals, own[1])
    return Workspace.of_size(partials, arrivals, device)
