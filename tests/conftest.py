"""What tests of every folder share."""

import os

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from tqdm import tqdm

from ebm_defense import LangevinPurifier, PurifiedClassifier, Purifier, load_data, load_defense
from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings

# Time limits would fail on a busy machine, and random examples would fail now and then.
settings.register_profile("ebm-defense", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ebm-defense"))
# Its monitor is a thread that now and then holds a lock; a process forked then waits for ever.
tqdm.monitor_interval = 0


class TwoClass(nn.Module):
    """Logits (−g/2, g/2) with the margin g(x) = w·x + b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def margin(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(1) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        half = self.margin(x) / 2.0
        return torch.stack([-half, half], dim=1)


class CountingPurifier(Purifier):
    """Adds a little noise, if it may, and remembers how many images each call purified."""

    chain_steps = 7

    def __init__(self):
        super().__init__()
        self.rows = []

    def purify(self, images, noise):
        self.rows.append(len(images))
        return images + 0.01 * noise.normal(0, images) if self.stochastic else images


@pytest.fixture
def counting_purifier():
    return CountingPurifier()


@pytest.fixture(scope="session")
def two_class():
    """Make a linear classifier of two classes from its weight `[C, H, W]` and bias."""

    def make(weight: Tensor, bias: float = 0.0) -> TwoClass:
        return TwoClass(weight, torch.tensor(bias, dtype=weight.dtype))

    return make


@pytest.fixture(scope="session")
def langevin_defense():
    """Make a tiny float64 Langevin defense of 1×8×8 images, weights random."""

    def make(
        steps: int = 3, replicates: int = 3, classes: int = 3, **options
    ) -> PurifiedClassifier:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
            classifier = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, classes)
            )
        chain = {"steps": steps, "step_size": 0.1, "temperature": 0.01}
        purifier = LangevinPurifier(energy.double().requires_grad_(False), **chain)
        return PurifiedClassifier(
            classifier.double(), purifier, replicates=replicates, **({"seed": 0} | options)
        )

    return make


@pytest.fixture(scope="session")
def sample():
    """The sample images that ship with the package."""
    return load_data("fashion-mnist-sample")


@pytest.fixture
def shipped():
    """Return the defense that ships, with short chains and few replicates for speed."""
    return load_defense("fashion-mnist-longrun", steps=5, replicates=2, seed=0)


@pytest.fixture(scope="session")
def tiny_defense(tmp_path_factory):
    """An untrained defense of 8×8 images, the size of data set `digits`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = WideResNet(WideResNetSettings(channels=1, depth=10, widen=1))
        energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    purifier = LangevinPurifier(energy, 3, 0.03, 9e-4)
    defense = PurifiedClassifier(normalized(network, 0.5, 0.5), purifier, replicates=2)
    return defense.save(tmp_path_factory.mktemp("tiny") / "defense")
