"""Parts of a layer in float64."""

import torch


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x by its root mean square, times weight."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def turn(x: torch.Tensor, weight: torch.Tensor | None, angle: torch.Tensor) -> torch.Tensor:
    """x [heads, head_dim] as complex numbers, multiplied with e^(i angle)."""
    x = x if weight is None else normed(x, weight, 1e-6)
    low, high = x.chunk(2, dim=1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angle), angle).to(torch.cdouble)
    return torch.cat((turned.real, turned.imag), dim=1)
