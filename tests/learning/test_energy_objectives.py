"""Every way to learn an energy finds what it should where the answer is known."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import integrate, special
from torch import nn

from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.recovery import recover
from ebm_defense.learning.energies.registry import OBJECTIVES
from ebm_defense.learning.energies.robust import RobustLoss, barron, log_normaliser
from ebm_defense.learning.energies.trainer import EnergyTrainer
from ebm_defense.noise import KeyedNoise, chain_keys

SPREAD, MEAN, TEMPERATURE = 0.2, 0.3, 0.5
SHAPE = (1, 2, 2)


class Gaussian(nn.Module):
    """U(x) = ½·e^c·‖x − m‖²; both are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(SHAPE))
        self.curvature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.curvature.exp() * (x - self.mean).square().flatten(1).sum(1)


def learned(objective: str, **options: object) -> Gaussian:
    """Learn from N(0.3, 0.2²) pixels and return the average over the last updates."""
    generator = torch.Generator().manual_seed(0)
    x = MEAN + SPREAD * torch.randn(4000, *SHAPE, generator=generator)
    base = {
        "updates": 150, "batch": 200, "adam_lr": 0.1, "final_lr": 1e-3, "average": 0.95,
        "data_noise": 0.0, "objective": objective,
        "langevin": LangevinSettings(steps=10, step_size=0.1, temperature=TEMPERATURE),
    }  # fmt: skip
    recipe = EnergyRecipe(**(base | options))
    trainer = EnergyTrainer(Gaussian(), ((x + 1) / 2).clamp(0, 1), recipe, precision="fp32")
    for _ in trainer.run():
        pass
    return trainer.averaged.module


def curvature(energy: Gaussian) -> float:
    """Return that of U/T, which is 1/variance of the density."""
    return float(energy.curvature.detach().exp()) / TEMPERATURE


# A batch of 200 images has 800 pixels, so that an estimate of a variance is off by 5%, one standard
# deviation; the average over the last twenty updates or so is off by between 1% and 2%.


def test_score_matching_finds_the_noisy_gaussian() -> None:
    energy, noise = learned("score-matching", noise_levels=(0.15,)), 0.15
    assert curvature(energy) == pytest.approx(1 / (SPREAD**2 + noise**2), rel=0.04)
    assert float((energy.mean - MEAN).abs().max().detach()) < 0.02


def test_score_matching_at_several_levels_finds_their_compromise() -> None:
    """Of quadratic energies the loss is least at a·σ₀² = 1/(1 + s²·mean(1/σ²)), σ₀ geometric."""
    levels = (0.1, 0.2, 0.4)
    energy = learned("score-matching", noise_levels=levels)
    inverse = sum(1 / s**2 for s in levels) / 3
    expected = 1 / (0.2**2 * (1 + SPREAD**2 * inverse))
    assert curvature(energy) == pytest.approx(expected, rel=0.04)
    assert float((energy.mean - MEAN).abs().max().detach()) < 0.02


def test_recovery_likelihood_finds_the_gaussian_itself_at_any_levels() -> None:
    # Adjusted, for else chains would be wider by the step size's bias, and the energy narrower.
    chain = LangevinSettings(steps=12, step_size=0.1, temperature=TEMPERATURE, adjusted=True)
    energy = learned("recovery-likelihood", noise_levels=(0.1, 0.2), langevin=chain)
    assert curvature(energy) == pytest.approx(1 / SPREAD**2, rel=0.08)
    assert float((energy.mean - MEAN).abs().max().detach()) < 0.03


def test_contrastive_divergence_finds_the_mean() -> None:
    energy = learned("contrastive-divergence")
    assert float((energy.mean - MEAN).abs().max().detach()) < 0.03


def test_what_is_recovered_has_the_conditional_law() -> None:
    """p(x | x̃) ∝ exp(−a(x − m)²/(2T) − (x̃ − x)²/(2σ²)) is N of the summed precisions."""
    a, count, spread = 8.0, 20_000, 0.3
    noisy = torch.full((count, *SHAPE), -0.4, dtype=torch.float64)
    energy = QuadraticEnergy(torch.full(SHAPE, MEAN).double(), torch.full((4,), a).double())
    precision = a / TEMPERATURE + 1 / spread**2
    mean = (a / TEMPERATURE * MEAN - 0.4 / spread**2) / precision
    keys = chain_keys(0, "recover", range(count), range(1))[0]
    chain = LangevinSettings(steps=40, step_size=0.2, temperature=TEMPERATURE, adjusted=True)
    x = recover(noisy, KeyedNoise(keys), spread, energy=energy, settings=chain).flatten(1)
    assert float((x.mean(0) - mean).abs().max()) < 4.5 * math.sqrt(1 / precision / count)
    assert float((x.var(0) * precision - 1).abs().max()) < 4.5 * math.sqrt(2 / count)
    plain = LangevinSettings(steps=40, step_size=0.2, temperature=TEMPERATURE)
    x = recover(noisy, KeyedNoise(keys), spread, energy=energy, settings=plain).flatten(1)
    # Unadjusted, the same chain is the AR(1) process with ρ = 1 − ε²/2·precision.
    rho = 1 - 0.02 * precision
    assert float((x.var(0) * (1 - rho**2) / 0.04 - 1).abs().max()) < 4.5 * math.sqrt(2 / count)


# Barron's loss


@pytest.mark.parametrize(
    ("shape", "known"),
    [
        (2.0, lambda z: z / 2),
        (1.0, lambda z: (z + 1).sqrt() - 1),
        (0.0, lambda z: (z / 2 + 1).log()),
        (-2.0, lambda z: 2 * z / (z + 4)),
        (-math.inf, lambda z: 1 - (-z / 2).exp()),
    ],
)
def test_the_robust_loss_is_the_one_of_its_name(shape: float, known) -> None:
    r = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(barron(r, shape, 0.7), known((r / 0.7) ** 2))
    # What its limits are, its neighbours come close to.
    if math.isfinite(shape):
        torch.testing.assert_close(barron(r, shape - 1e-6), barron(r, shape), rtol=1e-4, atol=1e-5)


def test_the_robust_loss_falls_with_its_shape_and_is_half_a_square_near_zero() -> None:
    shapes = [2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -10.0, -math.inf]
    values = [float(barron(torch.tensor(3.0), a)) for a in shapes]
    assert all(b < a for a, b in pairwise(values))
    small = torch.tensor(1e-3, dtype=torch.float64)
    for a in shapes:
        assert float(barron(small, a)) == pytest.approx(0.5e-6, rel=1e-4)


@pytest.mark.parametrize("shape", [0.001, 0.3, 1.0, 1.7, 1.999])
def test_its_normaliser_is_the_integral(shape: float) -> None:
    found = log_normaliser(torch.tensor(shape, dtype=torch.float64)).exp()
    area, _ = integrate.quad(
        lambda x: math.exp(-float(barron(torch.tensor(x).double(), shape))), 0, math.inf, limit=200
    )
    assert float(found) == pytest.approx(2 * area, rel=1e-3)
    if shape == 1.0:
        assert float(found) == pytest.approx(2 * math.e * special.k1(1.0), rel=1e-6)


@pytest.mark.parametrize(("tails", "low", "high"), [("normal", 1.6, 2.0), ("cauchy", 0.0, 0.6)])
def test_an_adaptive_loss_finds_its_shape_and_scale(tails: str, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(20_000, generator=generator, dtype=torch.float64)
    unit = torch.special.ndtri(draw) if tails == "normal" else (math.pi * (draw - 0.5)).tan()
    residual, loss = 0.3 * unit, RobustLoss("adaptive", 1.0)
    for group in loss.optimiser.param_groups:
        group["lr"] = 0.1
    for _ in range(150):
        loss(residual).backward()
        loss.descend()
    assert low < float(loss.shape.detach()) < high
    # Cauchy's density 1/(1 + x²/(2c²)) of α = 0 has half-width √2·c.
    expected = 0.3 if tails == "normal" else 0.3 / math.sqrt(2)
    assert float(loss.scale.detach()) == pytest.approx(expected, rel=0.15)


def test_a_robust_score_is_not_dragged_by_outliers() -> None:
    """One image in ten is far off; of the two losses Cauchy's keeps nearer to the others."""
    curvatures = {}
    for shape in (2.0, 0.0):
        generator = torch.Generator().manual_seed(0)
        x = SPREAD * torch.randn(2000, *SHAPE, generator=generator)
        x[::10] = 1.0
        recipe = EnergyRecipe(
            objective="score-matching", updates=100, batch=200, adam_lr=0.1, noise_levels=(0.15,),
            loss_shape=shape, loss_scale=0.3, average=0.95,
            langevin=LangevinSettings(temperature=TEMPERATURE),
        )  # fmt: skip
        trainer = EnergyTrainer(Gaussian(), ((x + 1) / 2).clamp(0, 1), recipe)
        list(trainer.run())
        curvatures[shape] = curvature(trainer.averaged.module)
    clean = 1 / (SPREAD**2 + 0.15**2)
    assert abs(curvatures[0.0] - clean) < abs(curvatures[2.0] - clean)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_goes_on_exactly(objective: str, tmp_path: Path) -> None:
    x = torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(0))
    recipe = EnergyRecipe(
        objective=objective, updates=6, batch=5, bank=10, noise_levels=(0.1, 0.3),
        loss_shape="adaptive", langevin=LangevinSettings(steps=2, step_size=0.1, temperature=0.1),
    )  # fmt: skip
    whole, begun, resumed = (EnergyTrainer(Gaussian(), x, recipe) for _ in range(3))
    list(whole.run())
    for _ in zip(range(3), begun.run(), strict=False):
        pass
    begun.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    list(resumed.run())
    assert torch.equal(resumed.energy.mean, whole.energy.mean)
    assert torch.equal(resumed.energy.curvature, whole.energy.curvature)
    states = [str(trainer.objective.state()) for trainer in (whole, resumed)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_levels": ()},
        {"noise_levels": (0.1, 0.0)},
        {"loss_shape": 2.5},
        {"loss_shape": "round"},
        {"loss_scale": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad)).split("_")[0]):
        EnergyRecipe(**bad)
