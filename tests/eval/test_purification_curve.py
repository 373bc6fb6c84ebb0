"""A quadratic energy compresses perturbations by a known factor a step."""

from __future__ import annotations

import pytest
import torch

from ebm_defense import LangevinPurifier, QuadraticEnergy, UsageError
from ebm_defense.eval.purification_curve import Point, purification_curve, recommend

SHAPE = (1, 2, 2)


def purifier(curvature: float = 2.0) -> LangevinPurifier:
    energy = QuadraticEnergy(torch.zeros(SHAPE).double(), torch.full((4,), curvature).double())
    return LangevinPurifier(energy, steps=10, step_size=0.1, temperature=0.05)


def images(count: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, *SHAPE, dtype=torch.float64, generator=draw) * 0.8 + 0.1


def classify(x: torch.Tensor) -> torch.Tensor:
    mean = x.flatten(1).mean(1)
    return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def test_compression_is_the_chain_s_own_factor_to_the_power_of_its_steps() -> None:
    x = images()
    labels = classify(x).argmax(1)
    points = purification_curve(
        purifier(), classify, x, x + 0.05, labels, lengths=(0, 1, 7, 30), replicates=3
    )
    factor = 1 - 0.1**2 / (2 * 0.05) * 2.0
    for point in points:
        assert point.compression == pytest.approx(factor**point.steps, rel=1e-9)
    assert points[0].clean == 1.0
    assert [p.steps for p in points] == [0, 1, 7, 30]


def test_perturbations_at_random_are_compressed_by_their_own_factor() -> None:
    stiff, loose = 2.0, 0.5
    curvature = torch.tensor([stiff, loose, 1.0, 1.0]).double()
    energy = QuadraticEnergy(torch.zeros(SHAPE).double(), curvature)
    chain = LangevinPurifier(energy, steps=10, step_size=0.1, temperature=0.05)
    x = images()
    attacked, wandered = x.clone(), x.clone()
    attacked[:, 0, 0, 0] += 0.05
    wandered[:, 0, 0, 1] -= 0.03
    (point,) = purification_curve(
        chain, classify, x, attacked, torch.zeros(6).long(), lengths=(5,), wandered=wandered
    )
    assert point.compression == pytest.approx((1 - 0.1 * stiff) ** 5, rel=1e-9)
    assert point.at_random == pytest.approx((1 - 0.1 * loose) ** 5, rel=1e-9)


def test_lengths_are_prefixes_of_the_same_chains() -> None:
    x = images()
    labels = torch.zeros(len(x), dtype=torch.int64)
    whole = purification_curve(purifier(), classify, x, x, labels, lengths=(3, 9))
    alone = purification_curve(purifier(), classify, x, x, labels, lengths=(9,))
    assert whole[-1].clean == alone[-1].clean


def test_what_is_right_depends_on_the_labels() -> None:
    x = images()
    labels = classify(x).argmax(1)
    wrong = purification_curve(purifier(), classify, x, x + 0.01, 1 - labels, lengths=(0,))
    assert wrong[0].clean == 0.0


def test_the_shortest_chain_that_is_as_good_as_the_best_is_recommended() -> None:
    points = [
        Point(0, 0.9, 0.0, 1.0),
        Point(10, 0.88, 0.6, 0.5),
        Point(50, 0.86, 0.605, 0.3),
        Point(200, 0.4, 0.4, 0.1),
    ]
    steps, reason = recommend(points)
    assert steps == 10
    assert "60.0% of attacked" in reason
    assert recommend(points[:2])[1].endswith("longer chains were not tried.")


def test_nothing_is_recommended_of_nothing() -> None:
    with pytest.raises(UsageError, match="no length"):
        recommend([])
    with pytest.raises(UsageError, match="lengths of 0"):
        purification_curve(
            purifier(), classify, images(), images(), torch.zeros(6).long(), lengths=(-1,)
        )
