"""Exact: on quadratic energies before a linear classifier deployed accuracy is known.

A Langevin step on U = Σ kᵢ(xᵢ − μᵢ)²/2 takes aᵢ = 1 − ε²kᵢ/(2T) of the distance to μ and adds
N(0, ε²), so that after K steps a purified image is Gaussian, of mean m + aᴷ(x − m) and variance
ε²·Σⱼ aᵢ²ʲ/4 a pixel, with m = (μ + 1)/2 in [0, 1] units. So is a linear margin, and the mean margin
of R replicates is right with probability Φ(mean·√R/sd). The worst attack lowers its mean by
eps·‖aᴷ·w‖ in the dual norm. No image is left out: two in three lie within two standard errors of a
boundary, half of them before the attack and half after it.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal
from torch import Tensor, nn

from ebm_defense import LangevinPurifier, PurifiedClassifier, Purifier, QuadraticEnergy
from ebm_defense.attacks import APGD, PGD, Full, Identity, ThreatModel
from ebm_defense.eval import Protocol, TwoStage, evaluate, get_protocol, paired

SHAPE, IMAGES, STEPS = (1, 2, 2), 400, 3
LEFT = {
    "isotropic": [0.9, 0.9, 0.9, 0.9],
    "anisotropic": [0.99, 0.9, 0.7, 0.5],
    # After an odd number of steps the sign of the negative ones is wrong for BPDA.
    "stiff": [-0.9, -0.95, 0.8, -0.7],
}
"""What a step leaves of each pixel's distance to the mean."""
THREATS = {"Linf": ThreatModel(eps=0.06), "L2": ThreatModel(norm="L2", eps=0.1)}
DUAL = {"Linf": 1, "L2": 2}


class Linear(nn.Module):
    """Logits (−g/2, g/2) of the margin g = w·x + b, and two classes that are never chosen."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        half = ((x * self.weight).flatten(1).sum(1) + self.bias) / 2.0
        never = torch.full_like(half, -20.0)
        return torch.stack([-half, half, never, never - 1.0], dim=1)


@dataclass(frozen=True, kw_only=True)
class World:
    """A case whose truth is known, at R replicates a prediction."""

    energy: str
    norm: str
    replicates: int

    def _normal(self, seed: int) -> Tensor:
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))

    @property
    def threat(self) -> ThreatModel:
        return THREATS[self.norm]

    @property
    def mean(self) -> Tensor:
        """μ, at the origin for the isotropic energy alone."""
        return 0.0 * self._normal(1) if self.energy == "isotropic" else 0.3 * self._normal(1)

    @property
    def weight(self) -> Tensor:
        return self._normal(2) / self._normal(2).norm()

    @property
    def left(self) -> Tensor:
        return torch.tensor(LEFT[self.energy]).view(SHAPE)

    @property
    def slope(self) -> Tensor:
        """The gradient of the mean margin to the image, through the chain."""
        return self.left**STEPS * self.weight

    @property
    def damage(self) -> float:
        """How far the worst attack lowers the mean margin."""
        return self.threat.eps * float(torch.linalg.vector_norm(self.slope, DUAL[self.norm]))

    @property
    def sd(self) -> float:
        """Of one replicate's margin: two standard errors of R of them are half the damage."""
        return self.damage * math.sqrt(self.replicates) / 4.0

    @property
    def step_size(self) -> float:
        gathered = sum(self.left ** (2 * j) for j in range(STEPS))
        return 2.0 * self.sd / float((self.weight**2 * gathered).sum().sqrt())

    def shrunk(self, images: Tensor) -> Tensor:
        """w·(mean purified image)."""
        centre = (self.mean + 1.0) / 2.0
        purified = centre + self.left**STEPS * (images - centre)
        return (purified * self.weight).flatten(1).sum(1)

    def defense(self) -> PurifiedClassifier:
        # With T = ε²/2 a step takes 1 − k of the distance.
        purifier = LangevinPurifier(
            QuadraticEnergy(self.mean, (1.0 - self.left).flatten()),
            steps=STEPS,
            step_size=self.step_size,
            temperature=self.step_size**2 / 2.0,
            precision="fp32",
        )
        bias = -float(self.shrunk(torch.full((1, *SHAPE), 0.5)))
        return PurifiedClassifier(
            Linear(self.weight, bias), purifier, replicates=self.replicates, max_chains=100_000
        )

    @property
    def margins(self) -> Tensor:
        """Mean margins, positive where right: by thirds about both boundaries, and everywhere."""
        third, near = IMAGES // 3, self.damage / 2.0
        return torch.cat(
            [
                torch.linspace(-near, near, third),
                self.damage + torch.linspace(-near, near, third),
                self.damage * torch.linspace(-1.0, 3.0, IMAGES - 2 * third),
            ]
        )

    def data(self) -> tuple[Tensor, Tensor]:
        """Images of these margins, eps inside the pixel box, and labels."""
        labels = torch.arange(IMAGES) % 2
        signed = self.margins * (2.0 * labels - 1.0)
        along = self.slope / self.slope.square().sum()
        images = 0.5 + signed.view(-1, 1, 1, 1) * along
        assert self.threat.eps <= float(images.min())
        assert float(images.max()) <= 1.0 - self.threat.eps
        return images, labels

    def truth(self, judge: int) -> dict[str, tuple[float, float]]:
        """Accuracy as deployed and the standard error of its estimate from `judge` draws."""
        found = {}
        for name, margins in {"clean": self.margins, "robust": self.margins - self.damage}.items():
            right = normal.cdf((margins * math.sqrt(self.replicates) / self.sd).double().numpy())
            error = math.sqrt((right * (1.0 - right)).sum() / (judge // self.replicates)) / IMAGES
            found[name] = (float(right.mean()), error)
        return found


def attack(name: str, threat: ThreatModel, gradient=None):
    budget = {"threat": threat, "replicates": 4, "gradient": gradient or Full()}
    if name == "PGD":  # each step leaves a sixteenth of what is off the axis
        return PGD(steps=3, step_size=16 * threat.eps, **budget)
    return APGD(steps=16, **budget)


def check(report, truth: dict[str, tuple[float, float]]) -> None:
    for found, (expected, error) in zip(
        (report.share("clean"), report.robust()), truth.values(), strict=True
    ):
        assert abs(found.value - expected) < 3.0 * error


@pytest.mark.parametrize("judge", [48, 150])
@pytest.mark.parametrize("replicates", [1, 4, 16])
@pytest.mark.parametrize("name", ["PGD", "APGD"])
@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("energy", LEFT)
def test_accuracy_as_deployed_is_the_one_that_theory_gives(energy, norm, name, replicates, judge):
    world = World(energy=energy, norm=norm, replicates=replicates)
    report = evaluate(
        world.defense(),
        *world.data(),
        attacks=[attack(name, world.threat)],
        judge_replicates=judge,
    )
    check(report, world.truth(judge))


def test_around_a_stiff_chain_bpda_climbs_the_wrong_way():
    world = World(energy="stiff", norm="Linf", replicates=4)
    around = evaluate(
        world.defense(),
        *world.data(),
        attacks=[attack("PGD", world.threat, Identity())],
        judge_replicates=48,
    )
    expected, error = world.truth(48)["robust"]
    assert around.robust().value > expected + 20.0 * error


@pytest.mark.parametrize("norm", THREATS)
def test_more_attacks_do_not_push_the_worst_of_all_below_the_truth(norm):
    world = World(energy="anisotropic", norm=norm, replicates=4)
    protocol = get_protocol(
        "standard", norm=norm, eps=world.threat.eps, steps=3, replicates=2, judge_replicates=48
    )
    report = evaluate(world.defense(), *world.data(), protocol)
    check(report, world.truth(48))
    each = [report.robust(i).value for i in range(len(protocol.attacks))]
    least = report.records.filter(regex=r"^\d .*: stands$").min(axis=1).mean()
    # Which the least of the attacks' own verdicts, image by image, would not be.
    expected, error = world.truth(48)["robust"]
    assert least < expected - 3.0 * error
    assert report.robust().value <= min(each) + 3.0 * error


class Coins(Purifier):
    """Replaces an image by black, which is wrong, as often as its first pixel says."""

    def purify(self, images, noise):
        drawn = noise.uniform(0, images[:, :1, :1, :1])
        return torch.where(drawn < images[:, :1, :1, :1], images, 0.0 * images)


class Lit(nn.Module):
    """Class 1 where the last pixel is above one half; without a gradient to climb."""

    def forward(self, x):
        lit = torch.sign(x[:, 0, -1, -1] - 0.5)
        return torch.stack([-lit, lit], dim=1)


def coins(chances: Tensor) -> tuple[Tensor, Tensor]:
    """Images that the classifier behind `Coins` has right with these chances, and labels."""
    images = torch.ones((len(chances), 1, 1, 2))
    images[:, 0, 0, 0] = chances
    return images, torch.ones(len(chances), dtype=torch.long)


HARMLESS = ThreatModel(eps=1e-6)


def test_the_interval_covers_the_truth_of_the_images_population():
    runs, size = 300, 40
    generator = np.random.default_rng(0)
    # Chances of a population whose mean is known: most images are nearly right or nearly wrong.
    chances = torch.tensor(generator.beta(0.4, 0.2, size=runs * size)).float()
    truth = 2.0 / 3.0
    defense = PurifiedClassifier(Lit(), Coins(), replicates=1, max_chains=100_000)
    start = PGD(threat=HARMLESS, steps=0, replicates=1)
    report = evaluate(defense, *coins(chances), attacks=[start], judge_replicates=10)
    covered = 0
    for some in range(runs):
        part = report.records.iloc[some * size : (some + 1) * size]
        found = dataclasses.replace(report, records=part).robust()
        covered += found.low <= truth <= found.high
    assert covered >= 0.94 * runs


def test_nothing_attacked_is_nothing_broken_at_a_hundred_looks():
    chances = torch.linspace(0.3, 1.0, 64)
    defense = PurifiedClassifier(Lit(), Coins(), replicates=5, max_chains=100_000)
    looks = PGD(threat=HARMLESS, steps=99, step_size=1e-6, replicates=5)
    report = evaluate(defense, *coins(chances), attacks=[looks], judge_replicates=50)
    clean, robust = (report.outcomes(name) for name in ("clean", "0 PGD-99: stands"))
    found = paired(clean, robust)
    assert found.low <= 0.0 <= found.high
    assert found.p_value > 0.05
    # Where every look is judged, the same defense is tried until it fails.
    published = Protocol(
        name="any look", attacks=(looks,), judge_replicates=50, verdict=TwoStage(), looks="every"
    )
    tried = evaluate(defense, *coins(chances), published)
    assert tried.robust().value < tried.share("clean").value - 0.1
