"""Barron's general and adaptive robust loss (Barron 2019), for residuals of regressions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.errors import UsageError

ADAPTIVE = "adaptive"
SHAPES = (1e-3, 2.0 - 1e-3)
"""Between what an adaptive shape is kept: its density has no normaliser below 0."""
RATE = 1e-2
"""Adam's learning rate of shape and scale."""


def barron(residual: Tensor, shape: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    """Return ρ(r, α, c) = |α−2|/α·(((r/c)²/|α−2| + 1)^(α/2) − 1) (Barron 2019, eq. 13).

    With α = 2 it is half the square, with 1 Charbonnier's smooth absolute value, with 0 Cauchy's
    loss, with −2 Geman and McClure's, and with −∞ Welsch's.

    Args:
        residual: any shape.
        shape: α, at most 2 and possibly −inf; a tensor lies strictly between 0 and 2.
        scale: c > 0, in units of the residual.
    """
    square = (residual / scale).square()
    if shape == 2.0:
        return 0.5 * square
    if shape == 0.0:
        return torch.log1p(0.5 * square)
    if shape == -math.inf:
        return -torch.expm1(-0.5 * square)
    apart = 2.0 - shape
    return apart / shape * ((square / apart + 1.0) ** (0.5 * shape) - 1.0)


def log_normaliser(shape: Tensor) -> Tensor:
    """Return log ∫ exp(−ρ(x, α, 1)) dx for α in (0, 2), differentiable by α (Barron 2019, eq. 15).

    By the trapezoidal rule in t, x = sinh t, whose error at this spacing is that of float32.
    """
    t = torch.linspace(-12.0, 12.0, 481, dtype=torch.float64, device=shape.device)
    logs = t.cosh().log() - barron(t.sinh(), shape.double())
    return (torch.logsumexp(logs, dim=0) + math.log(24.0 / 480)).to(shape.dtype)


class RobustLoss(nn.Module):
    """The mean of ρ(r, α, c), with α and c fixed or learned beside the weights.

    If they are learned it is the negative logarithm of the density that ρ belongs to, which is
    lowest where shape and scale fit the residuals.

    Args:
        shape: α, at most 2, or "adaptive"; -inf is Welsch's loss.
        scale: c > 0, in units of the residual; where an adaptive one begins.

    Raises:
        UsageError: a setting out of range.
    """

    def __init__(self, shape: float | str = 2.0, scale: float = 1.0) -> None:
        super().__init__()
        self.adaptive = shape == ADAPTIVE
        refuse_other(shape, scale)
        self.fixed = 2.0 if isinstance(shape, str) else shape
        begins = torch.tensor([0.0, math.log(scale)])
        self.learned = nn.Parameter(begins, requires_grad=self.adaptive)
        self.optimiser = torch.optim.Adam([self.learned], lr=RATE)

    @property
    def shape(self) -> Tensor | float:
        """α as it is now."""
        low, high = SHAPES
        return low + (high - low) * self.learned[0].sigmoid() if self.adaptive else self.fixed

    @property
    def scale(self) -> Tensor:
        """C as it is now."""
        return self.learned[1].exp()

    def forward(self, residual: Tensor) -> Tensor:
        loss = barron(residual, self.shape, self.scale).mean()
        if not self.adaptive:
            return loss
        assert isinstance(self.shape, Tensor)
        return loss + self.learned[1] + log_normaliser(self.shape)

    def descend(self) -> None:
        """Move shape and scale by the gradients that losses left, if they are learned."""
        if self.adaptive:
            self.optimiser.step()
            self.forget()

    def forget(self) -> None:
        """Drop those gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return what must be known to go on."""
        return {"learned": self.learned.data.clone(), "optimiser": self.optimiser.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            KeyError, ValueError: one of something else.
        """
        self.learned.data.copy_(state["learned"])
        self.optimiser.load_state_dict(state["optimiser"])


def refuse_other(shape: float | str, scale: float) -> None:
    """Refuse a shape or a scale out of range.

    Raises:
        UsageError: it is.
    """
    number = not isinstance(shape, str) and shape <= 2.0
    if not (shape == ADAPTIVE or number) or not 0 < scale < math.inf:
        raise UsageError(
            f"a robust loss has a shape of at most 2, or {ADAPTIVE}, and a scale above 0, not "
            f"{shape} and {scale}."
        )
