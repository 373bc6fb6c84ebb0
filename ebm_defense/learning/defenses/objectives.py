"""Losses of a defended prediction, minimised over weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits `[b, classes]` and labels `[b]` to losses `[b]`."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropies `[b]`."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return max(0, 1 + max_{i≠y} z_i − z_y) `[b]` (Crammer, Singer 2001)."""
    true = logits.gather(-1, labels[:, None]).squeeze(-1)
    others = logits.scatter(-1, labels[:, None], -float("inf")).amax(-1)
    return (1.0 + others - true).clamp_min(0.0)


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Return KL(softmax(clean) ‖ softmax(adversarial)) `[b]`."""
    target = clean.log_softmax(-1)
    return F.kl_div(adversarial.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)


ATTACKED: dict[str, Loss] = {"cross-entropy": cross_entropy, "margin": margin}
"""Losses of the attacked prediction alone."""
TRADES = "trades"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a training minimises.

    Attributes:
        loss: "cross-entropy" or "margin" of the attacked prediction, or "trades": cross-entropy of
            the clean one plus β times the divergence between both (Zhang et al. 2019).
        beta: β ≥ 0 of TRADES.
        clean: the share in [0, 1) that the clean image's loss has; TRADES has its own.
    """

    loss: str = "cross-entropy"
    beta: float = 6.0
    clean: float = 0.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.loss not in (*ATTACKED, TRADES):
            raise UsageError(f"loss is {self.loss!r}; choose one of {', '.join(ATTACKED)}, trades.")
        if not (self.beta >= 0 and 0 <= self.clean < 1):
            raise UsageError(
                f"beta must be 0 or more and clean lie in [0, 1), not {self.beta} and {self.clean}."
            )
        if self.loss == TRADES and self.clean:
            raise UsageError("TRADES weighs the clean loss by beta; leave out clean.")

    @property
    def needs_clean(self) -> bool:
        """Whether clean logits are asked for too."""
        return self.loss == TRADES or self.clean > 0

    @property
    def attacked(self) -> Loss:
        """What an attacker raises: the loss itself, and cross-entropy for TRADES."""
        return ATTACKED.get(self.loss, cross_entropy)

    def __call__(self, clean: Tensor | None, attacked: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits `[b, classes]`; `clean` is None unless `needs_clean`."""
        if clean is None:
            return self.attacked(attacked, labels).mean()
        if self.loss == TRADES:
            apart = self.beta * divergence(clean, attacked)
            return (cross_entropy(clean, labels) + apart).mean()
        both = (self.attacked(logits, labels).mean() for logits in (clean, attacked))
        return self.clean * next(both) + (1.0 - self.clean) * next(both)
