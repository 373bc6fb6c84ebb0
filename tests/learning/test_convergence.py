"""Long chains of energies whose truth is known are judged as what they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ebm_defense import QuadraticEnergy, UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnosis.convergence import (
    CONVERGENT,
    METASTABLE,
    NOT_CONVERGENT,
    judge_convergence,
    kept_classes,
    long_runs,
    mixing,
)
from ebm_defense.learning.diagnosis.diagnostics import cross_correlation, signs_of

T, SHAPE = 0.04, (1, 2, 2)
CURVATURE = torch.full((4,), 1.0)
QUADRATIC = QuadraticEnergy(torch.zeros(SHAPE), CURVATURE)


def data(count: int = 24, spread: float = 1.0) -> torch.Tensor:
    """Images from the density of `QUADRATIC` at temperature T, where `spread` is 1."""
    draw = torch.Generator().manual_seed(0)
    return spread * T**0.5 * torch.randn(count, *SHAPE, generator=draw)


def chain(steps: int = 1000) -> LangevinSettings:
    return LangevinSettings(steps=steps, step_size=0.1, temperature=T)


def judged(energy, learned_steps: int = 100, steps: int = 1000, images=None):
    chains = long_runs(energy, data() if images is None else images, chain(steps))
    return judge_convergence(chains, learned_steps=learned_steps)


def test_the_energy_of_the_data_itself_is_convergent() -> None:
    found = judged(QUADRATIC)
    assert found.verdict == CONVERGENT, found
    assert found.until == 1000
    assert abs(found.drift) < 0.3
    assert found.rhat < 1.05


def test_an_energy_of_far_wider_samples_than_the_data_is_not_convergent() -> None:
    found = judged(QUADRATIC, images=data(spread=0.1))
    assert found.verdict == NOT_CONVERGENT
    assert found.until < 100
    assert found.drift > 5


def test_chains_that_leave_only_after_the_time_of_learning_are_metastable() -> None:
    """A wall of energy 14 T around the data, beyond which it is a little lower and much wider."""

    def double(x: torch.Tensor) -> torch.Tensor:
        r = x.flatten(1).norm(dim=1)
        well = 0.5 * r.square()
        outside = 0.02 * (r - 3.0).square() - 0.1
        return torch.minimum(well, torch.where(r > 1.0, outside, well))

    found = judged(double, images=data(16))
    assert found.verdict == METASTABLE, found
    assert "noise" in found.reason or "until about step" in found.reason


def test_too_few_steps_never_prove_convergence() -> None:
    found = judged(QUADRATIC, learned_steps=500)
    assert found.verdict == METASTABLE
    assert "10 times the 500" in found.reason


def test_chains_that_run_away_are_not_convergent() -> None:
    found = judged(lambda x: -x.flatten(1).sum(1), learned_steps=100)
    assert found.verdict == NOT_CONVERGENT
    assert found.saturation > 0.9


def test_runs_depend_on_the_seed_alone_and_keep_what_they_say() -> None:
    first, again = (long_runs(QUADRATIC, data(4), chain(50), seed=3) for _ in range(2))
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.data, again.data)
    assert first.steps[0] == 0
    assert first.steps[-1] == 50
    assert first.data.shape == (len(first.steps), 4, *SHAPE)
    assert first.data_energy.shape == (4, 50)
    torch.testing.assert_close(first.data_energy[:, 0], QUADRATIC(first.data[0]))
    batch = long_runs(QUADRATIC, data(4)[:2], chain(50), seed=3)
    torch.testing.assert_close(batch.data, first.data[:, :2])


def test_mixing_knows_the_effective_sample_size_of_an_autoregression() -> None:
    rho, n = 0.9, 20_000
    draw = np.random.default_rng(0)
    x = np.empty((4, 2 * n))
    x[:, 0] = draw.normal(size=4)
    for k in range(1, 2 * n):
        x[:, k] = rho * x[:, k - 1] + np.sqrt(1 - rho**2) * draw.normal(size=4)
    rhat, bulk, _ = mixing(torch.from_numpy(x))
    assert rhat < 1.01
    assert bulk == pytest.approx(4 * n * (1 - rho) / (1 + rho), rel=0.15)
    apart, *_ = mixing(torch.from_numpy(x + np.arange(4)[:, None]))
    assert apart > 1.3


def test_nan_energies_do_not_mix() -> None:
    assert mixing(torch.full((2, 40), float("nan")))[0] == float("inf")


def test_kept_classes_are_those_that_the_chains_have_not_left() -> None:
    """A classifier of signs, and chains of which every other one changes its sign."""
    images = torch.cat([torch.zeros(4, *SHAPE), torch.ones(4, *SHAPE)])
    chains = long_runs(QUADRATIC, images * 2 - 1, chain(2), kept=2)
    flipped = images.clone()
    flipped[::2] = 1 - flipped[::2]
    states = torch.stack([images * 2 - 1, flipped * 2 - 1])

    def signs(x: torch.Tensor) -> torch.Tensor:
        bright = x.flatten(1).mean(1)
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)

    assert kept_classes(signs, replace(chains, data=states), images) == [1.0, 0.5]


def test_curves_that_oscillate_are_told_from_those_that_do_not() -> None:
    wave = [3.0 + (-1) ** k for k in range(40)]
    signs = signs_of([100.0] * 40 + wave, [0.0] * 40 + [0.5] * 40)
    assert signs.mean == 3.0
    assert signs.strength == 0.5
    assert signs.after_one == pytest.approx(-1.0, abs=0.03)
    assert signs.oscillates
    walk = np.random.default_rng(0).normal(size=400).cumsum().tolist()
    assert not signs_of(walk, walk).oscillates
    assert signs_of([1.0], [2.0]).after_one == 0.0
    with pytest.raises(UsageError, match="no update"):
        signs_of([], [])


def test_cross_correlation_peaks_at_the_lag_by_which_one_follows_the_other() -> None:
    x = np.random.default_rng(0).normal(size=500)
    followed = cross_correlation(x[3:].tolist(), x[:-3].tolist(), 10)
    assert len(followed) == 21
    assert int(np.argmax(followed)) - 10 == 3
    assert max(followed) > 0.95
    assert cross_correlation(x.tolist(), x.tolist())[50] == pytest.approx(1.0)
    assert set(cross_correlation([1.0] * 9, x[:9].tolist(), 3)) == {0.0}
    with pytest.raises(UsageError, match="do not correlate"):
        cross_correlation([1.0], [1.0, 2.0])


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UsageError, match="needs images"):
        long_runs(QUADRATIC, data(0), chain())
    with pytest.raises(UsageError, match="run them for 20000 steps"):
        judged(QUADRATIC, learned_steps=2000)
