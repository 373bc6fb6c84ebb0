"""Every energy network that a defense folder may hold, by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.over_prior import OverPrior, OverPriorSettings
from ebm_defense.energies.points import PointEnergy, PointEnergySettings
from ebm_defense.energies.residual import ResidualEnergy, ResidualEnergySettings


class Network(NamedTuple):
    """A network, and the settings that it is made from and keeps."""

    settings: type
    make: type[nn.Module]


ENERGIES: dict[str, Network] = {
    "ConvEnergy": Network(ConvEnergySettings, ConvEnergy),
    "ResidualEnergy": Network(ResidualEnergySettings, ResidualEnergy),
    "OverPrior": Network(OverPriorSettings, OverPrior),
    "PointEnergy": Network(PointEnergySettings, PointEnergy),
}
"""By the names of their classes; the first is what a folder that names none holds."""
