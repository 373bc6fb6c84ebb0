"""`ebm-defense assemble`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.commands.options import make_purifier
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.files import load_tensors
from ebm_defense.purifiers.base import LangevinPurifier, Purifier
from ebm_defense.weights import load_into, save_defense


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
    image_size: int = 28
    """Image height and width."""
    activation: str = "leaky_relu"
    """The energy's activation: leaky_relu or soft_lrelu."""
    steps: int = 200
    """Langevin steps K of a purification."""
    step_size: float = 0.06
    """Langevin step size, in [-1, 1] units."""
    temperature: float = 0.0036
    """Temperature T."""
    replicates: int = 16
    """Purifications an image."""
    description: str = ""
    """One sentence for lists."""
    data: str = "fashion-mnist"
    """The data set it was made for."""

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
        folder = save_defense(defense, self.out, description=self.description, data=self.data)
        print(f"the defense is {folder}; evaluate it with --defense {folder}")
        return 0

    def _purifier(self) -> Purifier:
        if (self.energy is None) == (self.purifier is None):
            raise UsageError("give either --energy or --purifier.")
        if self.purifier is not None:
            return make_purifier(self.purifier)
        assert self.energy is not None
        state = load_tensors(self.energy)
        energy = ConvEnergy(
            ConvEnergySettings.of(state, str(self.energy), self.image_size, self.activation)
        )
        load_into(energy, state, str(self.energy))
        return LangevinPurifier(energy, self.steps, self.step_size, self.temperature)


def _classifier(path: Path) -> nn.Module:
    state = load_tensors(path)
    network = WideResNet(WideResNetSettings.of(state, str(path)))
    load_into(network, state, str(path))
    return normalized(network, 0.5, 0.5)
