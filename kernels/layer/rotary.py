"""What rotates a layer's queries and keys."""

from dataclasses import dataclass

import torch

from granatum.kernels.backend import require


@dataclass(frozen=True, slots=True)
class Rotary:
    """Angles of every position, and the norms that come before the rotation.

    cos, sin:       float32 [positions, head_dim / 2], contiguous;
    q_norm, k_norm: [head_dim], weights of the RMS norm that Qwen3 applies to each head, or None;
    eps:            of these norms.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6

    def require(self, head_dim: int) -> None:
        """Refuse what no kernel takes.

        Raises:
            ValueError: naming it.
        """
        require(head_dim % 2 == 0, f"head_dim must be even, not {head_dim}")
        require((self.q_norm is None) == (self.k_norm is None), "q_norm and k_norm come together")
        contiguous = self.cos.is_contiguous() and self.sin.is_contiguous()
        require(contiguous, "cos and sin must be contiguous")
