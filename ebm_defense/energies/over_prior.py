"""An energy that is learned over another one, which stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.residual import ResidualEnergy, ResidualEnergySettings
from ebm_defense.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class OverPriorSettings:
    """What an `OverPrior` is made of.

    Attributes:
        energy: the shape of the energy E that is learned.
        prior: the shape of the energy E₀ beneath, which may be over a prior itself; None for none.
        weight: what E₀ is multiplied by, T/T₀ where chains feel E₀ at a temperature T₀; above 0.
        pull: κ ≥ 0 of the term κ·‖x‖²/2; T/τ² where chains feel ‖x‖²/(2τ²).

    Raises:
        UsageError: a number out of range, or an energy over nothing.
    """

    energy: ConvEnergySettings | ResidualEnergySettings
    prior: ConvEnergySettings | ResidualEnergySettings | OverPriorSettings | None = None
    weight: float = 1.0
    pull: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.weight < float("inf") and 0 <= self.pull < float("inf")):
            raise UsageError(
                f"weight must be above 0 and pull 0 or more, not {self.weight} and {self.pull}."
            )
        if self.prior is None and not self.pull:
            raise UsageError("an energy over a prior needs a prior energy, or a pull above 0.")


class OverPrior(nn.Module):
    """U(x) = E(x) + w·E₀(x) + κ·‖x‖²/2 (Hill et al. 2022, long-run).

    E learns; the prior E₀ is fixed. Chains of U go nowhere that the prior has made unlikely, so E
    need not learn to keep them from there.
    """

    def __init__(self, settings: OverPriorSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.energy = MADE_BY[type(s.energy)](s.energy)
        self.prior = None if s.prior is None else MADE_BY[type(s.prior)](s.prior)
        if self.prior is not None:
            self.prior.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        s, value = self.settings, self.energy(x)
        if self.prior is not None:
            value = value + s.weight * self.prior(x)
        return value + 0.5 * s.pull * x.square().flatten(1).sum(1) if s.pull else value

    def requires_grad_(self, requires_grad: bool = True) -> OverPrior:
        """Let the energy learn or not; the prior never does."""
        self.energy.requires_grad_(requires_grad)
        return self


MADE_BY: dict[type, Callable[..., nn.Module]] = {
    ConvEnergySettings: ConvEnergy,
    ResidualEnergySettings: ResidualEnergy,
    OverPriorSettings: OverPrior,
}
"""The network of each kind of settings."""


def over(energy: nn.Module, prior: nn.Module | None, *, weight: float, pull: float) -> OverPrior:
    """Put an energy over another one, and over κ·‖x‖²/2.

    Args:
        energy: a `ConvEnergy` or `ResidualEnergy`, which learns.
        prior: likewise or over a prior itself, which stays as it is; None for none.
        weight: w above 0.
        pull: κ ≥ 0.

    Raises:
        UsageError: other networks, or numbers out of range.
    """
    for part in (energy, prior):
        if part is not None and type(getattr(part, "settings", None)) not in MADE_BY:
            raise UsageError(
                f"a prior lies beneath a ConvEnergy or ResidualEnergy, not a {type(part).__name__}."
            )
    shapes = [None if part is None else part.settings for part in (energy, prior)]
    settings = OverPriorSettings(energy=shapes[0], prior=shapes[1], weight=weight, pull=pull)  # type: ignore[arg-type]
    both = OverPrior(settings)
    both.energy.load_state_dict(energy.state_dict())
    if prior is not None and both.prior is not None:
        both.prior.load_state_dict(prior.state_dict())
    return both
