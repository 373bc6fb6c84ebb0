"""The energy whose chain is known in closed form."""

from __future__ import annotations

from torch import Tensor, nn


class QuadraticEnergy(nn.Module):
    """U(x) = ½·(x − μ)ᵀA(x − μ), the energy whose chain is known in closed form.

    Under it Langevin dynamics is an autoregressive process of order one: the truth that the
    tests hold everything else against.

    Args:
        mean: μ, `[C, H, W]`, in [-1, 1] units.
        curvature: A, symmetric positive semi-definite `[d, d]`, d = C·H·W, or its diagonal.
    """

    def __init__(self, mean: Tensor, curvature: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("curvature", curvature)
        self.mean: Tensor
        self.curvature: Tensor

    def forward(self, x: Tensor) -> Tensor:
        d = (x - self.mean).flatten(1)
        pull = d * self.curvature if self.curvature.ndim == 1 else d @ self.curvature
        return 0.5 * (d * pull).sum(1)
