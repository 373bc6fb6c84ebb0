"""∇U of an energy over a prior: each part's own fastest gradient, added up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from ebm_defense.energies.over_prior import OverPrior
from ebm_defense.engine.base import Energy, EnergyGradient

Prepare = Callable[[Energy, Tensor, str], EnergyGradient]


class LayeredGradient:
    """Adds up the parts' gradients; see `EnergyGradient`.

    Args:
        energy: an energy over a prior.
        gradients: those of its networks, the energy's first.
    """

    def __init__(self, energy: OverPrior, gradients: Sequence[EnergyGradient]) -> None:
        self.gradients, self.pull = list(gradients), energy.settings.pull
        self.weights = (1.0, energy.settings.weight)[: len(self.gradients)]

    @property
    def signature(self) -> Hashable:
        parts = tuple(gradient.signature for gradient in self.gradients)
        return None if None in parts else ("layered", parts, self.weights, self.pull)

    @property
    def reads(self) -> Sequence[Tensor]:
        return [tensor for gradient in self.gradients for tensor in gradient.reads]

    def __call__(self, x: Tensor) -> Tensor:
        slopes = [gradient(x) for gradient in self.gradients]
        return self._sum(slopes, x)

    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = zip(*[gradient.with_energy(x) for gradient in self.gradients], strict=True)
        energy = sum(w * value for w, value in zip(self.weights, values, strict=True))
        return energy + 0.5 * self.pull * x.square().flatten(1).sum(1), self._sum(slopes, x)

    def _sum(self, slopes: Sequence[Tensor], x: Tensor) -> Tensor:
        total = slopes[0] + self.pull * x
        for weight, slope in zip(self.weights[1:], slopes[1:], strict=True):
            total.add_(slope, alpha=weight)
        return total


def supports(energy: Energy, x: Tensor, precision: str) -> bool:
    """Whether this is an energy over a prior; its parts then choose their own engines."""
    hooks = isinstance(energy, OverPrior) and (energy._forward_hooks or energy._forward_pre_hooks)
    return type(energy) is OverPrior and precision != "fp64" and not hooks


def prepared(prepare: Prepare) -> Prepare:
    """Return how the gradient of an energy over a prior is made, by what makes its parts'."""

    def make(energy: Energy, x: Tensor, precision: str) -> EnergyGradient:
        assert isinstance(energy, OverPrior)
        parts = [part for part in (energy.energy, energy.prior) if part is not None]
        return LayeredGradient(energy, [prepare(part, x, precision) for part in parts])

    return make
