"""Losses an attacker maximises, on replicate logits `[r, b, classes]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.defense import AVERAGES
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

_TINY = 1e-12
REPLICATES = "replicates"
LOSS_AVERAGES = (*(name for name in AVERAGES if name != "votes"), REPLICATES)


class Loss(Protocol):
    """Maps replicate logits `[r, b, classes]` and labels `[b]` to losses `[b]`, to be maximised.

    No image's loss may depend on another's. A `name`, if it has one, stands in tables.
    """

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor: ...


class TargetedLoss(Protocol):
    """A loss that rises towards `targets` `[b]`, classes other than the labels."""

    def __call__(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class AveragedLoss:
    """A loss of averaged replicates, or the average of the replicates' losses.

    Attributes:
        average: what is averaged over replicates: "logits" (as published), "softmax",
            "log_softmax", or "replicates", the losses themselves.

    Raises:
        UsageError: another average; votes have no gradient.
    """

    average: str = "logits"

    name: ClassVar[str]
    classes: ClassVar[int] = 2
    targeted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.average not in LOSS_AVERAGES:
            raise UsageError(f"a loss averages {', '.join(LOSS_AVERAGES)}, not {self.average!r}.")

    def _average(self, each: Callable[..., Tensor], logits: Tensor, *classes: Tensor) -> Tensor:
        """Apply `each`, on logits `[n, classes]` and classes `[n]`, before or after averaging."""
        if logits.shape[-1] < self.classes:
            raise UsageError(
                f"the {self.name} loss needs {self.classes} classes or more, not "
                f"{logits.shape[-1]}; use Margin()."
            )
        if self.average != REPLICATES:
            return each(AVERAGES[self.average](logits), *classes)
        repeated = (one.repeat(len(logits)) for one in classes)
        return each(logits.flatten(0, 1), *repeated).view(logits.shape[:2]).mean(0)


class UntargetedLoss(AveragedLoss):
    """An averaged loss that rises away from the labels."""

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses `[n]` of logits `[n, classes]`."""
        raise NotImplementedError

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._average(self.of, logits, labels)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(UntargetedLoss):
    """Cross-entropy; averaging "log_softmax" is averaging the replicates' own losses."""

    name = "CE"

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        # A mean of log-probabilities need not be normalised again; that would be another loss.
        if self.average == "log_softmax":
            return CrossEntropy(average=REPLICATES)(logits, labels)
        return super().__call__(logits, labels)


@dataclass(frozen=True, kw_only=True)
class Margin(UntargetedLoss):
    """max_{i≠y} z_i − z_y, negative while the image stands (Carlini and Wagner 2017)."""

    name = "CW"

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        true, others = _split(logits, labels)
        return others.amax(-1) - true


@dataclass(frozen=True, kw_only=True)
class DLR(UntargetedLoss):
    """Difference of logits ratio (Croce and Hein 2020, eq. 7), without its plateau.

    −(z_y − max_{i≠y} z_i)/(z_π1 − z_π3), as published, while the true class ranks first or second.
    Where it ranks third the published ratio is 1 whatever the logits are, and its gradient 0; there
    and below, the loss is 1 + m/(1 + m) of the margin m instead: above every loss of the first two
    ranks, rising in m, below 2, with a positive multiple of the margin's gradient.

    Raises:
        UsageError: fewer than 3 classes.
    """

    name = "DLR"
    classes = 3

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        true, others = _split(logits, labels)
        first, second = others.topk(2, dim=-1).values.unbind(-1)
        margin = first - true
        # Among the first two ranks the third-largest logit is the second-largest wrong one.
        ratio = margin / (torch.maximum(true, first) - second + _TINY)
        lost = margin.clamp_min(0.0)
        return torch.where(true >= second, ratio, 1.0 + lost / (1.0 + lost))


@dataclass(frozen=True, kw_only=True)
class TargetedDLR(AveragedLoss):
    """−(z_y − z_t)/(z_π1 − ½(z_π3 + z_π4)) for a target t (Croce and Hein 2020, eq. 8).

    Raises:
        UsageError: fewer than 4 classes.
    """

    name = "targeted DLR"
    classes = 4
    targeted = True

    def of(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Return the losses `[n]` of logits `[n, classes]` towards `targets` `[n]`."""
        first, _, third, fourth = logits.topk(4, dim=-1).values.unbind(-1)
        ahead = _of_class(logits, targets) - _of_class(logits, labels)
        return ahead / (first - 0.5 * (third + fourth) + _TINY)

    def __call__(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        return self._average(self.of, logits, labels, targets)


@dataclass(frozen=True, kw_only=True)
class Towards(UntargetedLoss):
    """Minus the cross-entropy of one chosen class; 0 on images that are of that class.

    Which class an attacked image is taken for, the records say; a verdict is on the true class.

    Attributes:
        target: the class, from 0.

    Raises:
        UsageError: a class below 0, or beyond the model's.
    """

    target: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        plain_numbers(self)
        if self.target < 0:
            raise UsageError(f"a target class must be 0 or more, not {self.target}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """A name for tables."""
        return f"CE to class {self.target}"

    @property
    def classes(self) -> int:  # type: ignore[override]
        """How few classes a model may tell apart."""
        return max(2, self.target + 1)

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        target = torch.full_like(labels, self.target)
        towards = -F.cross_entropy(logits, target, reduction="none")
        return torch.where(labels == self.target, 0.0 * towards, towards)


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(-1, classes[:, None]).squeeze(-1)


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the true class's logit `[n]` and the logits with it at −∞."""
    return _of_class(logits, labels), logits.scatter(-1, labels[:, None], -float("inf"))


LOSSES: dict[str, type[AveragedLoss]] = {
    "ce": CrossEntropy,
    "margin": Margin,
    "dlr": DLR,
    "targeted-dlr": TargetedDLR,
    "towards": Towards,
}


def loss_name(loss: Loss | TargetedLoss) -> str:
    """Return a loss's name for tables, with its average if not "logits"; a function's own name."""
    name = getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__))
    average = getattr(loss, "average", "logits")
    return str(name) if average == "logits" else f"{name}({average})"


def takes_targets(loss: Loss | TargetedLoss) -> bool:
    """Return whether a loss needs targets; one of your own says so by `targeted = True`."""
    return bool(getattr(loss, "targeted", False))


def refuse_targeted(loss: Loss, attack: str) -> None:
    """Refuse a loss that needs targets where nobody chooses them."""
    if takes_targets(loss):
        raise UsageError(
            f"{attack} chooses no targets for the {loss_name(loss)} loss; give it another loss, "
            "or use TargetedAPGD."
        )
