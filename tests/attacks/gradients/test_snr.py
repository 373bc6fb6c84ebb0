"""The signal of an EOT gradient: exact on vectors, right in the mean on a known gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import CrossEntropy, Full
from ebm_defense.attacks.gradients.base import GradientEstimate
from ebm_defense.attacks.gradients.snr import compare, eot_signal
from ebm_defense.noise import KeyedNoise
from ebm_defense.purifiers.baselines import GaussianNoise, NoPurifier
from ebm_defense.purifiers.registry import baseline

IMAGES, SIZE = 64, 8


def test_two_gradients_that_agree_are_all_signal():
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    signal = compare(4, g, g)
    assert (signal.replicates, signal.ratio) == (4, math.inf)
    assert signal.cosine == pytest.approx(1.0)


def test_opposite_and_vanishing_gradients_have_no_signal():
    g = torch.ones(2, 5).double()
    assert compare(1, g, -g).ratio == 0.0
    assert compare(1, g, -g).cosine == pytest.approx(-1.0)
    assert compare(1, 0 * g, 0 * g).cosine == 0.0


def test_orthogonal_noise_on_equal_signal_is_worked_out_by_hand():
    first, second = torch.tensor([[3.0, 1.0]]).double(), torch.tensor([[3.0, -1.0]]).double()
    signal = compare(1, first, second)
    assert signal.cosine == pytest.approx(0.8)  # 8/10
    assert signal.ratio == pytest.approx(2.0)  # √(8 / (4/2))
    assert signal.low == pytest.approx(0.8)


@dataclass(frozen=True)
class Noisy:
    """A gradient of ones with standard normal noise a replicate: its ratio is √replicates."""

    name: str = "noisy"

    def __call__(self, defense, images, labels, keys, loss):
        draws = [KeyedNoise(k).normal(0, images) for k in keys]
        return GradientEstimate(1.0 + torch.stack(draws).mean(0), torch.zeros(*keys.shape, 2))

    def chain_steps(self, defense):
        return 0


def measure(defense, gradient, replicates, count=IMAGES):
    images, labels = torch.full((count, 1, SIZE, SIZE), 0.5).double(), torch.arange(count) % 2
    options = {"gradient": gradient, "loss": CrossEntropy(), "replicates": replicates}
    return eot_signal(defense, images, labels, **options)


def test_the_ratio_is_the_one_known_and_grows_with_the_root_of_replicates():
    defense = PurifiedClassifier(torch.nn.Flatten(), GaussianNoise(0.1))
    for row in measure(defense, Noisy(), [1, 4, 16]):
        n = row.replicates
        # Relative standard error about 1/√(64·64·n), so 8% is far beyond chance.
        assert row.ratio == pytest.approx(math.sqrt(n), rel=0.08)
        assert row.cosine == pytest.approx(n / (n + 1), abs=0.03)
        assert row.low < row.cosine


def test_a_defense_gains_signal_with_replicates(langevin_defense):
    rows = measure(langevin_defense(), Full(), [1, 16], count=4)
    assert rows[0].ratio < rows[1].ratio
    assert rows[0].cosine < rows[1].cosine


@pytest.mark.parametrize(
    ("purifier", "replicates", "count", "said"),
    [
        (NoPurifier(), [1], 2, "deterministic"),
        (GaussianNoise(0.1), [0], 2, "at least 1"),
        (GaussianNoise(0.1), [], 2, "at least 1"),
        (GaussianNoise(0.1), [1], 0, "images"),
    ],
)
def test_what_cannot_be_measured_is_refused(purifier, replicates, count, said):
    defense = PurifiedClassifier(torch.nn.Flatten(), purifier)
    with pytest.raises(UsageError, match=said):
        measure(defense, Full(), replicates, count)


def test_a_gradient_that_the_defense_lacks_is_refused_before_any_look():
    purifier = baseline("jpeg:75")
    purifier.stochastic = True
    with pytest.raises(UsageError, match="use the gradient Identity"):
        measure(PurifiedClassifier(torch.nn.Flatten(), purifier), Full(), [1], 2)
