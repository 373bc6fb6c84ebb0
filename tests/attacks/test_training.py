"""Perturbations for adversarial training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense import UsageError
from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.training import TrainingPerturbation


class Linear(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_stays_within_eps_and_does_not_clip_to_the_box(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(9, 3, generator=generator))
    images = torch.ones(4, 1, 3, 3)
    labels = torch.tensor([0, 1, 2, 0])
    make = TrainingPerturbation(threat=ThreatModel(eps=0.1), steps=steps)
    perturbed = make(model, images, labels, generator)
    assert (perturbed - images).abs().max() <= 0.1 + 1e-6
    assert perturbed.max() > 1.0
    assert F.cross_entropy(model(perturbed), labels) > F.cross_entropy(model(images), labels)


def test_on_a_linear_classifier_it_walks_straight_towards_the_worst_corner() -> None:
    weight = torch.stack(
        [torch.randn(9, generator=torch.Generator().manual_seed(1)), torch.zeros(9)], dim=1
    )
    images, labels = torch.full((3, 1, 3, 3), 0.5), torch.zeros(3, dtype=torch.long)
    start = 0.1 * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(2)) - 1)
    make = TrainingPerturbation(threat=ThreatModel(eps=0.1), steps=20)
    perturbed = make(Linear(weight), images, labels, torch.Generator().manual_seed(2))
    # Every step has the gradient's sign, and all of them together a length of 1.25 eps.
    walked = start.flatten(1) - 0.125 * weight[:, 0].sign()
    torch.testing.assert_close((perturbed - images).flatten(1), walked.clamp(-0.1, 0.1))


def test_no_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 step"):
        TrainingPerturbation(threat=ThreatModel(eps=0.1), steps=0)
