"""What rotates a layer's queries and keys."""

from dataclasses import dataclass

import torch

from granatum.kernels.backend import require


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles of every position, and the norms that come before the rotation.

    cos, sin:       float32 [positions, head_dim / 2], contiguous;
    q_norm, k_norm: [head_dim], weights of each head's RMS norm; None: heads are not normed;
    eps:            of these norms.

    Raises:
        ValueError: a tensor that no kernel takes.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check what does not depend on a call."""
        require((self.q_norm is None) == (self.k_norm is None), "q_norm and k_norm come together")
        contiguous = self.cos.is_contiguous() and self.sin.is_contiguous()
        require(contiguous, "cos and sin must be contiguous")

    def require(self, head_dim: int) -> None:
        """Refuse heads for which there are no angles.

        Raises:
            ValueError: naming both.
        """
        if self.cos.shape[1] * 2 != head_dim:
            raise ValueError(f"{self.cos.shape[1]} angles do not rotate heads of {head_dim}")
