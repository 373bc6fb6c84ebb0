"""Energies that know classes: a network of one output a class, read as an energy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebm_defense.errors import UsageError


class LogSumExpEnergy(nn.Module):
    """U(x) = −log Σ_y exp f_y(x): a classifier as an energy (Grathwohl et al. 2020, JEM).

    Args:
        network: maps `[N, C, H, W]` in [-1, 1] to logits `[N, classes]`; a classifier of
            [0, 1] images is told so by `unit`.
        unit: whether the network takes images in [0, 1].
        classes: the classes that count; all if not given. A single one is the energy of that
            class, −f_y(x).

    Raises:
        UsageError: no class is named.
    """

    def __init__(
        self, network: nn.Module, *, unit: bool = False, classes: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        if classes is not None and not classes:
            raise UsageError("name at least one class, or none at all for every class.")
        self.network, self.unit, self.classes = network, unit, classes

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        logits = self.network((x + 1.0) / 2.0 if self.unit else x)
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise UsageError(
                f"an energy of classes needs logits [N, classes], not shape {tuple(logits.shape)}."
            )
        if self.classes is not None:
            self._refuse_absent(logits.shape[1])
            logits = logits[:, list(self.classes)]
        return -torch.logsumexp(logits, dim=1)

    def of_class(self, label: int) -> LogSumExpEnergy:
        """Return the energy of one class alone, U(x, y) = −f_y(x), on the same network."""
        return LogSumExpEnergy(self.network, unit=self.unit, classes=(label,))

    def _refuse_absent(self, count: int) -> None:
        assert self.classes is not None
        if not all(0 <= y < count for y in self.classes):
            raise UsageError(f"classes are 0 to {count - 1}, not {list(self.classes)}.")

    def extra_repr(self) -> str:
        return f"unit={self.unit}, classes={self.classes}"
