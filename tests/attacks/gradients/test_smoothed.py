"""The smoothed gradient lends corners a curvature, and nothing else changes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense import LangevinPurifier, PurifiedClassifier, QuadraticEnergy, UsageError
from ebm_defense.attacks import CrossEntropy, Full, Identity, Smoothed, ThreatModel
from ebm_defense.attacks.gradients.smoothed import LentCurvature
from ebm_defense.attacks.optimisers.pgd import PGD
from ebm_defense.energies.conv import SoftLeakyReLU
from ebm_defense.engine.derivatives import hessian_product
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.purifiers.baselines import NoPurifier

SLOPE, PIXELS = 0.05, 16


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Energy(nn.Module):
    """A dense energy of 1×4×4 images, with layers of the given widths and one activation."""

    def __init__(self, activation: nn.Module, *widths: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = [PIXELS, *widths, 1]
            layers: list[nn.Module] = [nn.Flatten()]
            for fan_in, fan_out in pairwise(sizes):
                layers += [nn.Linear(fan_in, fan_out), activation]
            self.layers = nn.Sequential(*layers[:-1]).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).flatten()


def leaky(*widths: int) -> Energy:
    return Energy(nn.LeakyReLU(SLOPE), *widths)


def behind(energy, steps: int = 6, **options) -> PurifiedClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3)).double()
    purifier = energy if isinstance(energy, Purifier) else LangevinPurifier(energy, steps, 0.3, 0.1)
    return PurifiedClassifier(classifier, purifier, replicates=2, seed=0, **options)


def pulled(gradient, defense, count: int = 3, rows: slice = slice(None), seed: int = 7):
    """What a random cotangent becomes at random images."""
    keys = chain_keys(seed, "test", range(count), range(2))[:, rows]
    images = normal(count, 1, 4, 4, seed=1).sigmoid()[rows]
    cotangent = normal(2, count, 1, 4, 4, seed=2)[:, rows]
    return gradient.purify(defense, images, keys).vjp(cotangent), cotangent


def test_it_bends_a_leaky_relu_network_where_the_full_gradient_is_the_identity():
    defense = behind(leaky(12, 8))
    found, cotangent = pulled(Smoothed(width=0.3, stride=1), defense)
    assert torch.equal(pulled(Full(), defense)[0], cotangent)
    assert float((found - cotangent).norm() / cotangent.norm()) > 0.02


def test_its_product_is_the_sum_over_layers_of_bent_units():
    # vᵀHv = Σ over units of δ·σ''(a)·(J_a·v)², with J and δ of the true network.
    energy, x, v = leaky(12, 8), normal(1, 1, 4, 4, seed=1), normal(1, 1, 4, 4, seed=2)
    width, first, second = 0.3, energy.layers[1], energy.layers[3]

    def units(x):
        a = first(x.flatten(1))
        return a, second(F.leaky_relu(a, SLOPE))

    expected = 0.0
    for layer in range(2):
        a, moved = torch.func.jvp(lambda x, i=layer: units(x)[i], (x,), (v,))
        h = F.leaky_relu(a, SLOPE)
        delta = torch.func.grad(lambda h, i=layer: energy.layers[3 + 2 * i :](h).sum())(h)
        e, half = width * a.std(correction=0), (1 - SLOPE) / 2
        bend = half * e**2 / (a**2 + e**2) ** 1.5
        expected += float((delta * bend * moved**2).sum().detach())
    with LentCurvature(width):
        product = hessian_product(energy, x, v)
    assert float((product * v).sum()) == pytest.approx(expected, rel=1e-9)


def test_before_one_layer_it_is_the_full_gradient_of_the_soft_network():
    # Only there are the soft network's other slopes and pre-activations those of the true one; and
    # one step from one image, so that the two chains are at the same place.
    corner, x = leaky(24), normal(1, 1, 4, 4, seed=1).sigmoid()
    deviation = float(corner.layers[:2](2 * x - 1).detach().std(correction=0))
    soft = Energy(SoftLeakyReLU(SLOPE, 0.3 * deviation), 24)
    found, cotangent = pulled(Smoothed(width=0.3, stride=1), behind(corner, steps=1), count=1)
    full, _ = pulled(Full(), behind(soft, steps=1), count=1)
    torch.testing.assert_close(found, full, rtol=0.0, atol=1e-12)
    assert not torch.allclose(found, cotangent, atol=1e-3)


def test_without_width_it_is_the_identity():
    found, cotangent = pulled(Smoothed(width=1e-9, stride=1), behind(leaky(12, 8)))
    torch.testing.assert_close(found, cotangent, rtol=0.0, atol=1e-6)


def test_the_width_has_no_scale():
    plain, scaled = leaky(12), leaky(12)
    with torch.no_grad():
        scaled.layers[1].weight *= 10.0
        scaled.layers[1].bias *= 10.0
        scaled.layers[3].weight /= 10.0
    found, again = (pulled(Smoothed(stride=1), behind(e))[0] for e in (plain, scaled))
    torch.testing.assert_close(found, again, rtol=0.0, atol=1e-10)


def test_an_images_gradient_depends_neither_on_those_beside_it_nor_on_chunks_nor_on_storage():
    whole, _ = pulled(Smoothed(stride=2), behind(leaky(12, 8)))
    alone, _ = pulled(Smoothed(stride=2), behind(leaky(12, 8)), rows=slice(1, 2))
    torch.testing.assert_close(alone, whole[:, 1:2], rtol=0.0, atol=1e-12)
    other = Smoothed(stride=2, store="checkpoints")
    chunked, _ = pulled(other, behind(leaky(12, 8), max_chains=4))
    torch.testing.assert_close(chunked, whole, rtol=0.0, atol=1e-12)


CURVATURE = torch.diag(torch.linspace(0.1, 1.0, PIXELS, dtype=torch.float64))


class Bowl(nn.Module):
    """A quadratic energy that calls an activation to no effect, so that its Hessian is known."""

    def __init__(self) -> None:
        super().__init__()
        self.bowl = QuadraticEnergy(torch.zeros(1, 4, 4).double(), CURVATURE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bowl(x) + 0.0 * F.relu(x).flatten(1).sum(1)


def step_matrix(drifts: float) -> torch.Tensor:
    return torch.eye(PIXELS).double() - drifts * 0.45 * CURVATURE  # ε²/2T = 0.3²/0.2


@pytest.mark.parametrize("perturbed", [{}, {"perturbation": 0.1, "draws": 3}])
def test_a_stride_takes_the_drift_of_its_steps_together(perturbed):
    # Seven steps in threes are 3 + 3 + 1. A quadratic's Hessian is the same at a perturbed start.
    found, cotangent = pulled(Smoothed(stride=3, **perturbed), behind(Bowl(), steps=7))
    jacobian = step_matrix(3) @ step_matrix(3) @ step_matrix(1)
    expected = (cotangent.flatten(2) @ jacobian).view_as(cotangent)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_perturbations_move_the_way_back_alone_and_vanish_with_their_size():
    defense = behind(leaky(12, 8))
    plain, _ = pulled(Smoothed(width=1.0, stride=1), defense)
    for size, near in ((1e-9, True), (0.3, False)):
        gradient = Smoothed(width=1.0, stride=1, perturbation=size, draws=2)
        assert torch.allclose(pulled(gradient, defense)[0], plain, atol=1e-6) == near
    images = normal(3, 1, 4, 4, seed=1).sigmoid()
    keys = chain_keys(7, "test", range(3), range(2))
    gradient = Smoothed(perturbation=0.3)
    with torch.no_grad():
        true = defense.purify_replicates(images, keys)
    assert torch.equal(gradient.purify(defense, images, keys).images, true)


def test_draws_are_independent_of_one_another_and_of_the_chain():
    defense = behind(leaky(12, 8))
    one, two, four = (
        pulled(Smoothed(width=0.3, perturbation=0.3, draws=n), defense)[0] for n in (1, 2, 4)
    )
    assert not torch.allclose(one, two, atol=1e-4)
    assert not torch.allclose(two, four, atol=1e-4)


class Telling(SteppedPurifier):
    """Steps whose way back multiplies the cotangent by the state that they started from."""

    chain_steps = 2

    def advance(self, x, noise, steps):
        return x

    def vjp_step(self, cotangent, x, noise, step):
        return cotangent * (x if step == 0 else 1.0) + 0.0 * F.relu(x)


def test_perturbations_are_the_noise_of_the_steps_after_the_chains():
    gradient = Smoothed(stride=1, perturbation=0.5, draws=3)
    found, cotangent = pulled(gradient, behind(Telling()))
    keys = chain_keys(7, "test", range(3), range(2))
    images = normal(3, 1, 4, 4, seed=1).sigmoid()
    for r in range(2):
        noise = KeyedNoise(keys[r])
        start = images + 0.5 * sum(noise.normal(2 + draw, images) for draw in range(3)) / 3
        torch.testing.assert_close(found[r], cotangent[r] * start)


def test_the_width_may_change_geometrically_along_the_chain():
    gradient = Smoothed(width=1.0, end_width=0.01)
    widths = [gradient.width_at(k, 5) for k in range(5)]
    assert widths == pytest.approx([1.0, 10**-0.5, 0.1, 10**-1.5, 0.01])
    defense = behind(leaky(12, 8))
    constant, annealed = (
        pulled(Smoothed(stride=1, width=1.0, **o), defense)[0] for o in ({}, {"end_width": 0.01})
    )
    assert not torch.allclose(constant, annealed, atol=1e-4)


def test_the_defenses_own_network_stays_as_it_was():
    energy = leaky(12, 8)
    defense, x = behind(energy), normal(2, 1, 4, 4)
    before, kinds = energy(x), [type(m) for m in energy.modules()]
    pulled(Smoothed(), defense)
    assert torch.equal(energy(x), before)
    assert [type(m) for m in energy.modules()] == kinds
    assert torch.equal(hessian_product(energy, x, x), torch.zeros_like(x))


@pytest.mark.parametrize(
    "activation",
    [F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(inplace=True), lambda x: F.leaky_relu(x, 0.2)],
)
def test_it_finds_relus_in_any_function(activation):
    weight = normal(PIXELS, 9)
    defense = behind(lambda x: activation(x.flatten(1) @ weight).sum(1))
    found, cotangent = pulled(Smoothed(), defense)
    assert not torch.allclose(found, cotangent, atol=1e-3)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("energy", [Energy(nn.Tanh(), 8), Energy(SoftLeakyReLU(), 8)])
def test_an_energy_without_corners_is_refused(energy):
    with pytest.raises(UsageError, match="neither LeakyReLU nor ReLU"):
        pulled(Smoothed(), behind(energy))


def test_a_dead_layer_gives_finite_gradients():
    energy = leaky(8)
    nn.init.zeros_(energy.layers[1].weight)
    nn.init.zeros_(energy.layers[1].bias)
    found, cotangent = pulled(Smoothed(), behind(energy))
    assert torch.equal(found, cotangent)


def test_without_a_purifier_it_is_the_full_gradient():
    defense, keys = behind(NoPurifier()), chain_keys(0, "test", range(2), range(1))
    images, labels = normal(2, 1, 4, 4).sigmoid(), torch.tensor([0, 1])
    full, smoothed = (
        g(defense, images, labels, keys, CrossEntropy()).gradient for g in (Full(), Smoothed())
    )
    assert torch.equal(full, smoothed)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"width": 0.0}, "widths must be above 0"),
        ({"end_width": -1.0}, "widths must be above 0"),
        ({"stride": 0}, "stride and draws"),
        ({"draws": 0}, "stride and draws"),
        ({"perturbation": -0.1}, "perturbation must be"),
        ({"draws": 2}, "perturbation above 0"),
        ({"store": "some"}, "store"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Smoothed(**wrong)


def test_it_states_its_cost():
    defense = behind(leaky(8), steps=40)
    dense, sparse = (Smoothed(stride=s).chain_steps(defense) - 40 for s in (1, 4))
    assert dense == Full().chain_steps(defense) - 40
    assert sparse == dense / 4
    perturbed = Smoothed(stride=4, perturbation=0.1, draws=3).chain_steps(defense)
    assert perturbed == 40 + 3 * (40 + sparse)


def test_it_drives_pgd(langevin_defense):
    defense = langevin_defense()
    images, labels = normal(3, 1, 8, 8).sigmoid(), torch.tensor([0, 1, 2])
    attack = PGD(threat=ThreatModel(eps=0.05), steps=2, replicates=2, gradient=Smoothed())
    assert bool((attack.threat.size(attack(defense, images, labels), images) <= 0.05 + 1e-9).all())
    assert attack.chain_steps(defense) > PGD(steps=2, replicates=2).chain_steps(defense)


def test_identity_and_smoothed_see_the_same_logits():
    defense, keys = behind(leaky(8)), chain_keys(0, "test", range(2), range(2))
    images, labels = normal(2, 1, 4, 4).sigmoid(), torch.tensor([0, 1])
    looks = [g(defense, images, labels, keys, CrossEntropy()) for g in (Identity(), Smoothed())]
    assert torch.equal(looks[0].logits, looks[1].logits)
