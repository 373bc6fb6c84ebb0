"""The hand-written Hessian-vector product is double backward's, which takes what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import ConvEnergy, ConvEnergySettings, LangevinPurifier, PurifiedClassifier
from ebm_defense.attacks import Full, Smoothed
from ebm_defense.attacks.gradients.smoothed import LentCurvature
from ebm_defense.energies.conv import SoftLeakyReLU
from ebm_defense.engine import ENGINES, Engine, prepare_product
from ebm_defense.engine.derivatives import arithmetic, hessian_product
from ebm_defense.engine.product import ConvProduct
from ebm_defense.noise import chain_keys

# Channels, size, width: the smallest, odd sizes, and the layouts that ship, narrow.
SHAPES = [(1, 8, 2), (2, 9, 3), (3, 15, 2), (1, 28, 4), (3, 32, 4)]
LENT_CURVATURE = {"soft_lrelu": None, "leaky_relu": LentCurvature(0.3)}


def energy_of(channels=1, size=8, width=2, activation="soft_lrelu") -> ConvEnergy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"channels": channels, "image_size": size, "width": width}
        energy = ConvEnergy(ConvEnergySettings(**shape, activation=activation))
    for layer in energy.f:
        if isinstance(layer, SoftLeakyReLU):
            layer.width = 0.1  # at a narrower bend float32 itself loses digits of the curvature
    return energy


def state_and_vector(energy: ConvEnergy, count: int = 3) -> torch.Tensor:
    """Images of different sizes, so that their standard deviations differ; and a vector."""
    s = energy.settings
    shape = (2, count, s.channels, s.image_size, s.image_size)
    both = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    both[0] *= torch.logspace(-1, 0.5, count).view(-1, 1, 1, 1)
    return both


def by_autograd(energy, x, v, lent_curvature=None, precision="fp32"):
    if lent_curvature is None:
        with arithmetic(precision, x.device):
            return hessian_product(energy, x, v)
    with arithmetic(precision, x.device), lent_curvature:
        return hessian_product(energy, x, v)


def by_engine(energy, x, v, lent_curvature=None, precision="fp32"):
    lent = None if lent_curvature is None else lent_curvature.curvature
    return prepare_product(energy, x, precision)(x, v, lent)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of an image's product."""
    norms = [t.double().flatten(1).norm(dim=1) for t in (found.double() - expected, expected)]
    return float((norms[0] / norms[1]).max())


@pytest.mark.parametrize("activation", LENT_CURVATURE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_product_is_double_backwards(shape, activation, count):
    energy, lent_curvature = energy_of(*shape, activation), LENT_CURVATURE[activation]
    x, v = state_and_vector(energy, count)
    found = by_engine(energy, x, v, lent_curvature)
    assert found.dtype == torch.float32
    assert off(found, by_autograd(energy, x, v, lent_curvature)) < 3e-6
    exact = by_autograd(energy.double(), x.double(), v.double(), lent_curvature)
    assert off(found, exact) < 3e-6


def test_at_the_narrow_bend_of_the_published_activation_it_is_as_exact_as_double_backward():
    energy = energy_of(1, 28, 4)
    for layer in energy.f[1::2]:
        layer.width = 0.01
    x, v = state_and_vector(energy)
    ours, theirs = (f(energy, x, v) for f in (by_engine, by_autograd))
    exact = by_autograd(energy.double(), x.double(), v.double())
    assert off(ours, exact) < 1.5 * off(theirs, exact)


def test_activations_may_be_mixed_and_only_corners_are_lent_curvature():
    energy = energy_of(activation="leaky_relu")
    energy.f[3] = SoftLeakyReLU(slope=0.2, width=0.1)
    energy.f[5] = nn.LeakyReLU(0.3)
    x, v = state_and_vector(energy)
    for lent_curvature in (None, LentCurvature(0.3)):
        assert (
            off(by_engine(energy, x, v, lent_curvature), by_autograd(energy, x, v, lent_curvature))
            < 5e-6
        )


@pytest.mark.parametrize("activation", LENT_CURVATURE)
def test_images_do_not_mix_however_many_are_taken_at_once(activation):
    energy, lent_curvature = energy_of(2, 9, 3, activation), LENT_CURVATURE[activation]
    x, v = state_and_vector(energy, 5)
    product = ConvProduct(energy, "fp32")
    lent = None if lent_curvature is None else lent_curvature.curvature
    whole = product(x, v, lent)
    product.at_once = 2
    assert off(product(x, v, lent), whole) < 2e-6
    for i in range(5):
        assert off(product(x[i : i + 1], v[i : i + 1], lent), whole[i : i + 1]) < 2e-6


def test_many_images_are_taken_a_few_at_once(monkeypatch):
    energy, sizes = energy_of(), []
    product, (x, v) = ConvProduct(energy, "fp32"), state_and_vector(energy, 5)
    honest = product._product
    product.at_once = 2
    monkeypatch.setattr(product, "_product", lambda *a: sizes.append(len(a[0])) or honest(*a))
    product(x, v)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("activation", LENT_CURVATURE)
def test_bf16_rounds_about_as_double_backward_in_bf16_does(activation):
    energy, lent_curvature = energy_of(1, 28, 4, activation), LENT_CURVATURE[activation]
    x, v = state_and_vector(energy, 4)
    exact = by_autograd(energy, x, v, lent_curvature)
    found = off(by_engine(energy, x, v, lent_curvature, "bf16"), exact)
    assert 1e-4 < found < 1.5 * off(by_autograd(energy, x, v, lent_curvature, "bf16"), exact)


@pytest.mark.parametrize("activation", LENT_CURVATURE)
def test_neither_grad_mode_nor_autocast_nor_layout_matters(activation):
    energy, lent_curvature = energy_of(3, 9, 3, activation), LENT_CURVATURE[activation]
    x, v = state_and_vector(energy)
    before = x.clone(), v.clone()
    expected = by_engine(energy, x, v, lent_curvature)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(by_engine(energy, x, v, lent_curvature), expected)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, v)]
    assert torch.equal(by_engine(energy, *last, lent_curvature), expected)
    assert not expected.requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(v, before[1])


def test_without_curvature_the_product_is_zero_and_nothing_is_computed():
    energy = energy_of(activation="leaky_relu")
    x, v = state_and_vector(energy)
    product = ConvProduct(energy, "fp32")
    product._product = None  # whatever runs would fail
    assert torch.equal(product(x, v), torch.zeros_like(v))


class Scaled(ConvEnergy):
    def forward(self, x):
        return 2.0 * super().forward(x)


def hooked() -> ConvEnergy:
    energy = energy_of()
    energy.f[0].register_forward_hook(lambda module, given, value: 2.0 * value)
    return energy


def test_what_the_engine_does_not_know_has_no_product_of_its_own():
    energy = energy_of()
    x, _ = state_and_vector(energy)
    assert prepare_product(energy, x, "fp32") is not None
    for other, images, precision in [
        (energy_of().double(), x.double(), "fp64"),
        (energy_of(), x[:0], "fp32"),
        (Scaled(energy.settings), x, "fp32"),
        (hooked(), x, "fp32"),
        (lambda x: x.square().flatten(1).sum(1), x, "fp32"),
    ]:
        assert prepare_product(other, images, precision) is None


def test_a_product_that_fails_to_be_made_is_left_to_autograd(monkeypatch, caplog):
    def fail(energy, x, precision):
        raise RuntimeError("no such kernel")

    energy = energy_of()
    monkeypatch.setitem(ENGINES, "convolutional", Engine(lambda *_: True, fail, fail))
    assert prepare_product(energy, state_and_vector(energy)[0], "fp32") is None
    assert "no such kernel" in caplog.text


def pulled(gradient, energy, purifier=LangevinPurifier, dtype=torch.float32):
    defense = PurifiedClassifier(nn.Identity(), purifier(energy, 5, 0.1, 1e-4, "fp32"))
    images, cotangent = state_and_vector(energy).to(dtype)
    keys = chain_keys(0, "test", range(3), range(2))
    found = gradient.purify(defense, images.sigmoid(), keys)
    return found.vjp(torch.stack([cotangent, cotangent.flip(0)]))


class Unprepared(LangevinPurifier):
    """A chain whose way back is double backward's."""

    def prepared_vjp(self, x, precision):
        return None


GRADIENTS = {
    "soft_lrelu": [Full(), Full(store="checkpoints")],
    "leaky_relu": [
        Smoothed(stride=1),
        Smoothed(stride=3, width=0.5, end_width=0.1),
        Smoothed(stride=2, perturbation=0.1, draws=2),
    ],
}
CASES = [(a, g) for a, gradients in GRADIENTS.items() for g in gradients]


@pytest.mark.parametrize(("activation", "gradient"), CASES)
def test_the_way_back_is_the_same_with_the_engine_and_without(activation, gradient, monkeypatch):
    energy = energy_of(1, 9, 3, activation)
    expected = pulled(gradient, energy, Unprepared)
    sizes = []

    def recorded(energy, x, v):
        sizes.append(len(x))
        return hessian_product(energy, x, v)

    monkeypatch.setattr("ebm_defense.purifiers.langevin.hessian_product", recorded)
    torch.testing.assert_close(pulled(gradient, energy), expected, rtol=0.0, atol=1e-5)
    # Only the question whether there are corners, of one image, is put to torch itself.
    assert all(size == 1 for size in sizes)
    cotangent = state_and_vector(energy)[1]
    assert not torch.allclose(expected[0], cotangent, atol=1e-2)


def test_the_product_is_prepared_once_a_chain(monkeypatch):
    made, honest = [], ConvProduct.prepare

    def counted(energy, x, precision):
        made.append(precision)
        return honest(energy, x, precision)

    engine = ENGINES["convolutional"]._replace(product=counted)
    monkeypatch.setitem(ENGINES, "convolutional", engine)
    pulled(Full(precision="bf16"), energy_of())
    assert made == ["bf16"]


def test_full_is_exactly_the_identity_without_curvature():
    energy = energy_of(activation="leaky_relu")
    found = pulled(Full(), energy)
    cotangent = state_and_vector(energy)[1]
    assert torch.equal(found[0], cotangent)


class Own(LangevinPurifier):
    """A chain with a way back of its own."""

    def vjp_step(self, cotangent, x, noise, step):
        return 2.0 * cotangent


def test_a_purifiers_own_way_back_and_float64_are_kept(monkeypatch):
    energy = energy_of()
    assert torch.equal(pulled(Full(), energy, Own), 2.0**5 * pulled(Full(), energy, Flat))
    monkeypatch.setattr(ConvProduct, "__call__", None)  # whatever runs would fail
    assert pulled(Full(), energy.double(), dtype=torch.float64).dtype == torch.float64


class Flat(LangevinPurifier):
    def vjp_step(self, cotangent, x, noise, step):
        return cotangent
