"""Every energy network that a defense folder may hold, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.residual import ResidualEnergy, ResidualEnergySettings


class Network(NamedTuple):
    """A network, and the settings that it is made from and keeps."""

    settings: type
    make: type[nn.Module]


ENERGIES: dict[str, Network] = {
    "ConvEnergy": Network(ConvEnergySettings, ConvEnergy),
    "ResidualEnergy": Network(ResidualEnergySettings, ResidualEnergy),
}
"""By the names of their classes; the first is what a folder that names none holds."""

USUAL = next(iter(ENERGIES))


def name_of(network: Any) -> str | None:
    """Return a network's name in `ENERGIES`; None for one that has none."""
    return next((name for name, n in ENERGIES.items() if n.make is type(network)), None)
