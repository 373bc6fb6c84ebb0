"""The flow along composed attributes is the equation's, and its gradient exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ebm_defense.attacks import Full
from ebm_defense.generators.networks import (
    DenseEncoder,
    DenseGenerator,
    DenseSettings,
    LatentClassifier,
    LatentClassifierSettings,
)
from ebm_defense.noise import KeyedNoise
from ebm_defense.purifiers import AttributePurifier

NOISE = KeyedNoise(torch.tensor([1, 2, 3]))
VALUES = (3, 2)


def purifier(steps: int, time: float = 1.5) -> AttributePurifier:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        shape = DenseSettings(latent=4, image_size=3, hidden=6)
        classifier = LatentClassifier(LatentClassifierSettings(size=4, values=VALUES, hidden=8))
        for weight in classifier.parameters():
            torch.nn.init.normal_(weight, std=0.7)
        made = classifier, DenseGenerator(shape), DenseEncoder(shape)
    return AttributePurifier(*made, steps, time).double().requires_grad_(False)


def images() -> torch.Tensor:
    return torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()


def followed(flow: AttributePurifier) -> np.ndarray:
    """Where the equation leads, by a solver of high order on the energy written out anew."""
    start = flow.enter(images())

    def slope(_, flat):
        z = torch.tensor(flat).view(3, 4).requires_grad_()
        first, second = flow.latent_classifier.net(z).split(VALUES, dim=1)
        b, c = start["belief"].split(VALUES, dim=1)
        either = (first.softmax(1) * b).sum(1).log() + (second.softmax(1) * c).sum(1).log()
        return torch.autograd.grad(either.sum(), z)[0].numpy().ravel()

    found = solve_ivp(slope, (0, flow.time), start["z"].numpy().ravel(), "DOP853", rtol=1e-11)
    return found.y[:, -1].reshape(3, 4)


def ends(steps: int) -> np.ndarray:
    flow = purifier(steps)
    return flow.advance(flow.enter(images()), NOISE, range(steps))["z"].numpy()


def test_it_is_the_flow_of_the_equation_to_second_order():
    exact = followed(purifier(1))
    errors = [np.abs(ends(steps) - exact).max() for steps in (10, 20, 40)]
    assert errors[0] < 0.01
    assert np.abs(ends(1) - exact).max() > 10 * errors[0]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.25)


def test_it_goes_down_the_energy_and_a_uniform_belief_does_not_move():
    flow = purifier(10)
    start = flow.enter(images())
    after = flow.advance(start, NOISE, range(10))
    assert (flow.energy(**after) < flow.energy(**start)).all()
    unsure = torch.cat([torch.full((3, v), 1 / v) for v in VALUES], dim=1).double()
    still = flow.advance({"z": start["z"], "belief": unsure}, NOISE, range(10))
    torch.testing.assert_close(still["z"], start["z"])


def test_the_gradient_is_plain_autograd_s_through_belief_and_flow():
    flow, x = purifier(6), images()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    found = Full(store="checkpoints").differentiate(flow, x, NOISE, 0.0).vjp(upstream)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(flow.purify(leaf, NOISE), leaf, upstream)
    torch.testing.assert_close(found, expected)
    towards, step = upstream / upstream.norm(), 1e-5
    pair = [flow.purify(x + sign * step * towards, NOISE) for sign in (1, -1)]
    slope = ((pair[0] - pair[1]) * upstream).sum() / (2 * step)
    torch.testing.assert_close((found * towards).sum(), slope, rtol=1e-5, atol=1e-9)


def test_the_belief_of_the_start_is_held_while_latents_move():
    """So that the slope is that of the energy at z alone, also where autograd sees them linked."""
    flow = purifier(1)
    z = flow.enter(images())["z"].requires_grad_()
    belief = flow.latent_classifier(z).exp()
    linked = flow.advance({"z": z, "belief": belief}, NOISE, range(1))
    apart = flow.advance({"z": z.detach(), "belief": belief.detach()}, NOISE, range(1))
    torch.testing.assert_close(linked["z"].detach(), apart["z"])


def test_fewer_steps_take_the_same_time_and_the_first_alone_its_own():
    flow = purifier(6)
    assert (flow.shortened(3).steps, flow.shortened(3).time) == (3, 1.5)
    assert (flow.brief(images()).steps, flow.brief(images()).time) == (1, 0.25)
    assert not flow.stochastic
