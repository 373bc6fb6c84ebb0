"""`ebm-defense assemble`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.commands.options.shared import make_purifier
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.registry import ENERGIES
from ebm_defense.errors import UsageError
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import load_tensors
from ebm_defense.storage.folders import save_defense
from ebm_defense.storage.state_dicts import load_weights, read_about
from ebm_defense.storage.weights import network_of

CONV = "ConvEnergy"


@dataclass(frozen=True, kw_only=True)
class Assemble:
    """Put trained parts together into a defense folder that `evaluate --defense` takes.

    The purifier is a Langevin chain on --energy, or a baseline named by --purifier.
    """

    out: Path
    """The defense folder to write."""
    classifier: Path
    """classifier.safetensors of train-classifier."""
    undefended: Path | None = None
    """Weights to report as undefended; the classifier's own if not given."""
    energy: Path | None = None
    """energy.safetensors of train-ebm."""
    purifier: str | None = None
    """A baseline instead of an energy: gaussian:0.25."""
    image_size: int | None = None
    """Image height and width; as the energy's weights say if not given."""
    activation: str | None = None
    """The energy's activation, leaky_relu or soft_lrelu; as its weights say if not given."""
    steps: int = 200
    """Langevin steps K of a purification."""
    step_size: float = 0.06
    """Langevin step size, in [-1, 1] units."""
    temperature: float = 0.0036
    """Temperature T."""
    adjusted: bool = False
    """Let a Metropolis test accept or refuse each Langevin step (MALA)."""
    replicates: int = 16
    """Purifications an image."""
    description: str = ""
    """One sentence for lists."""
    data: str | None = None
    """The data set it was made for; as the classifier's weights say if not given."""

    def run(self) -> int:
        """Load the parts and save the defense."""
        undefended = None if self.undefended is None else _classifier(self.undefended)
        classifier = _classifier(self.classifier)
        defense = PurifiedClassifier(
            classifier,
            self._purifier(),
            replicates=self.replicates,
            undefended=undefended,
        )
        data = self.data or read_about(self.classifier).get("data", "")
        folder = save_defense(defense, self.out, description=self.description, data=data)
        print(f"the defense is {folder}; evaluate it with --defense {folder}")
        return 0

    def _purifier(self) -> Purifier:
        if (self.energy is None) == (self.purifier is None):
            raise UsageError("give either --energy or --purifier.")
        if self.purifier is not None:
            return make_purifier(self.purifier)
        assert self.energy is not None
        return LangevinPurifier(
            self._network(self.energy),
            self.steps,
            self.step_size,
            self.temperature,
            adjusted=self.adjusted,
        )

    def _network(self, path: Path) -> nn.Module:
        """Return the energy that the weights say they are of, a conv energy if they do not."""
        said = str(read_about(path).get("network", CONV))
        if said not in ENERGIES:
            raise UsageError(f"{path} holds weights of a {said}, not of an energy.")
        if said != CONV:
            return network_of(path, ENERGIES)
        energy = ConvEnergy(self._shape(path))
        load_weights(energy, path)
        return energy

    def _shape(self, path: Path) -> ConvEnergySettings:
        """Return the energy's shape as its weights tell it; what they do not is asked for."""
        said = read_about(path)
        given: dict[str, Any] = {"image_size": self.image_size, "activation": self.activation}
        for name, value in given.items():
            if value is None and name not in said:
                raise UsageError(
                    f"{path} does not say the {name} that it was trained with, and its shapes do "
                    f"not tell; give --{name.replace('_', '-')}."
                )
            if value is not None and said.get(name, value) != value:
                raise UsageError(
                    f"{path} was trained with {name} {said[name]}, not {value}; leave the option "
                    "out."
                )
        known = {name: said[name] if value is None else value for name, value in given.items()}
        return ConvEnergySettings.of(load_tensors(path), str(path), **known)


def _classifier(path: Path) -> nn.Module:
    said = read_about(path)
    network = WideResNet(WideResNetSettings.of(load_tensors(path), str(path)))
    load_weights(network, path)
    return normalized(network, said.get("mean", 0.5), said.get("std", 0.5))
