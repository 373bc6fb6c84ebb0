"""The truth: on a quadratic energy before a linear classifier, robust accuracy is known exactly.

Langevin dynamics on U = ‖x − μ‖²/(2s²) contracts the distance to μ by a = 1 − ε²/(2Ts²) a step and
adds N(0, ε²) to it, so that after k steps the purified image is Gaussian with mean
m + aᵏ(x − m) and, a pixel, variance ε²(1 − a²ᵏ)/(1 − a²)/4, all in [0, 1] units with
m = (μ + 1)/2. A linear margin w·x + b is then Gaussian too, and its mean over infinitely many
replicates falls under the worst attack by exactly aᵏ·eps·‖w‖ in the dual norm. A mean of H
replicates errs by sd/√H: an image whose mean margin is further than a few of those from 0, after
the attack, has to be decided as theory does. Of the few others `test_exactness` tells.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import norm as normal
from torch import Tensor

from ebm_defense import LangevinPurifier, PurifiedClassifier, QuadraticEnergy
from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.eval import evaluate

CONTRACTION, SPREAD = 0.97, 0.8  # a and s
IMAGES, REPLICATES = 40, 8
SURE = 5.0  # standard errors beyond which a mean of replicates does not err: 3 in ten million
BAND = 0.05  # those standard errors, as a share of the damage that the attack can do
DUAL = {"Linf": 1, "L2": 2}


@dataclass(frozen=True, kw_only=True)
class World:
    """A case whose truth is known: an energy, a chain, a linear classifier, a threat model."""

    threat: ThreatModel
    size: int
    steps: int

    def _normal(self, seed: int, count: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((count, 1, self.size, self.size), generator=generator)

    @property
    def mean(self) -> Tensor:
        """The energy's μ, in [-1, 1] units, far on one side of the classifier."""
        return 0.3 * self._normal(1)[0] + 4.0 * self.weight

    @property
    def weight(self) -> Tensor:
        """The classifier's w, of unit length."""
        return self._normal(2)[0] / self._normal(2).norm()

    @property
    def kept(self) -> float:
        """What the chain leaves of a distance: aᵏ."""
        return CONTRACTION**self.steps

    @property
    def damage(self) -> float:
        """How far the worst attack moves the mean margin."""
        dual = torch.linalg.vector_norm(self.weight, DUAL[self.threat.norm])
        return self.kept * self.threat.eps * float(dual)

    @property
    def margin_sd(self) -> float:
        """The standard deviation of one replicate's margin that makes the band `BAND`."""
        return BAND * self.damage * math.sqrt(REPLICATES) / SURE

    @property
    def step_size(self) -> float:
        """The ε that makes a replicate's margin vary by `margin_sd`."""
        steps = sum(CONTRACTION ** (2 * i) for i in range(self.steps))
        return 2.0 * self.margin_sd / math.sqrt(steps)

    @property
    def temperature(self) -> float:
        """The T at which a step contracts by `CONTRACTION`."""
        return self.step_size**2 / (2.0 * SPREAD**2 * (1.0 - CONTRACTION))

    def shrunk(self, images: Tensor) -> Tensor:
        """w·(mean purified image), over infinitely many replicates."""
        centre = (self.mean + 1.0) / 2.0
        return ((centre + self.kept * (images - centre)) * self.weight).flatten(1).sum(1)

    @property
    def bias(self) -> float:
        """The b that makes grey images undecided."""
        return -float(self.shrunk(torch.full((1, 1, self.size, self.size), 0.5)))

    def images(self, margins: Tensor) -> Tensor:
        """Textured images of these mean margins, eps inside the pixel box."""
        texture = 0.01 * self._normal(3, len(margins))
        texture -= (texture * self.weight).flatten(1).sum(1).view(-1, 1, 1, 1) * self.weight
        images = 0.5 + texture + (margins / self.kept).view(-1, 1, 1, 1) * self.weight
        assert self.threat.eps <= float(images.min())
        assert float(images.max()) <= 1.0 - self.threat.eps
        return images

    def defense(self, two_class) -> PurifiedClassifier:
        curvature = torch.full((self.size**2,), SPREAD**-2)
        purifier = LangevinPurifier(
            QuadraticEnergy(self.mean, curvature),
            steps=self.steps,
            step_size=self.step_size,
            temperature=self.temperature,
            precision="fp32",
        )
        return PurifiedClassifier(two_class(self.weight, self.bias), purifier, REPLICATES)

    def attack(self) -> PGD:
        """PGD of enough steps for the ball's corner: each quarters what is off the axis."""
        budget = {"steps": 5, "step_size": 4 * self.threat.eps, "replicates": REPLICATES}
        return PGD(threat=self.threat, **budget)


def agree(column, truth: Tensor, sure: Tensor) -> None:
    found = torch.tensor(column.to_numpy()) == 1
    assert found[sure].tolist() == truth[sure].tolist()


EPS = {"Linf": (4 / 255, 8 / 255, 16 / 255), "L2": (0.05, 0.1, 0.2)}
THREATS = [ThreatModel(norm=norm, eps=eps) for norm, row in EPS.items() for eps in row]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("size", [4, 10, 28])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_robust_accuracy_is_the_one_that_theory_gives(two_class, threat, size, steps):
    world = World(threat=threat, size=size, steps=steps)
    band = SURE * world.margin_sd / math.sqrt(REPLICATES)
    # Signed so that a positive margin is a right answer; some images are wrong from the start.
    margins = world.damage * torch.linspace(-0.5, 1.8, IMAGES)
    labels = torch.arange(IMAGES) % 2
    images = world.images(margins * (2.0 * labels - 1.0))

    report = evaluate(
        world.defense(two_class),
        images,
        labels,
        attacks=[world.attack()],
        judge_replicates=REPLICATES,
    )

    left = margins - world.damage
    certain = left.abs() > band
    agree(report.records["clean"], margins > 0, margins.abs() > band)
    agree(report.records["0 PGD-5: stands"], left > 0, certain)
    surely_right = int((left > band).sum())
    undecided = int((~certain).sum())
    assert 0 < surely_right < IMAGES - undecided
    assert undecided <= 0.2 * IMAGES
    right = round(report.robust().value * IMAGES)
    assert surely_right <= right <= surely_right + undecided


@pytest.mark.parametrize("size", [4, 10, 28])
def test_single_draws_are_right_as_often_as_theory_says(two_class, size):
    draws, steps = 1000, 5
    world = World(threat=ThreatModel(norm="L2", eps=0.1), size=size, steps=steps)
    margins = world.margin_sd * torch.linspace(-2.0, 2.0, 9)
    labels = torch.ones(9, dtype=torch.long)
    look = PGD(threat=world.threat, steps=0, replicates=1)
    report = evaluate(
        world.defense(two_class),
        world.images(margins),
        labels,
        attacks=[look],
        judge_replicates=draws,
    )
    expected = normal.cdf((margins / world.margin_sd).double().numpy())
    error = (expected * (1 - expected) / draws) ** 0.5
    assert (abs(report.records["clean: votes"].to_numpy() - expected) < 4.0 * error).all()
