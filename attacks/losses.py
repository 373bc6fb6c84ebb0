"""Losses an attacker maximises, on replicate logits `[r, b, classes]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from ebm_defense.defense import AVERAGES
from ebm_defense.errors import UsageError


class Loss(Protocol):
    """Maps replicate logits `[r, b, classes]` and labels `[b]` to losses `[b]`, to be maximised."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy of the averaged replicates.

    Attributes:
        average: "logits" (as published), "softmax", or "log_softmax", which equals the mean of
            the replicates' own losses.
    """

    average: str = "logits"

    def __post_init__(self) -> None:
        allowed = [name for name in AVERAGES if name != "votes"]
        if self.average not in allowed:
            raise UsageError(f"a loss averages {', '.join(allowed)}, not {self.average!r}.")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        averaged = AVERAGES[self.average](logits)
        if self.average == "logits":
            return F.cross_entropy(averaged, labels, reduction="none")
        # A mean of log-probabilities need not be normalised again; that would be another loss.
        return F.nll_loss(averaged, labels, reduction="none")


LOSSES: dict[str, Callable[..., Loss]] = {"ce": CrossEntropy}
