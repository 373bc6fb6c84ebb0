"""Energy networks have the published layout, and the smooth ones have curvature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hvp

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, SoftLeakyReLU, channels_last
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.errors import UsageError

PUBLISHED = {
    "f.0": ((32, 3, 3, 3), (1, 1), (1, 1)),
    "f.2": ((64, 32, 4, 4), (2, 2), (1, 1)),
    "f.4": ((128, 64, 4, 4), (2, 2), (1, 1)),
    "f.6": ((256, 128, 4, 4), (2, 2), (1, 1)),
    "f.8": ((1, 256, 4, 4), (1, 1), (0, 0)),
}

quick = settings(deadline=None, max_examples=25, derandomize=True)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small(activation: str = "leaky_relu") -> ConvEnergy:
    torch.manual_seed(0)
    shape = ConvEnergySettings(channels=1, image_size=8, width=3, activation=activation)
    return ConvEnergy(shape).double()


def test_default_network_has_the_published_keys_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in ConvEnergy().state_dict().items()}
    expected = {f"{k}.weight": shape for k, (shape, _, _) in PUBLISHED.items()}
    expected |= {f"{k}.bias": shape[:1] for k, (shape, _, _) in PUBLISHED.items()}
    assert shapes == expected


def test_default_network_has_the_published_strides_and_paddings():
    layers = dict(ConvEnergy().named_modules())
    found = {k: (layers[k].stride, layers[k].padding) for k in PUBLISHED}
    assert found == {k: (stride, padding) for k, (_, stride, padding) in PUBLISHED.items()}


def test_default_network_has_the_published_activation_at_odd_indices():
    network = ConvEnergy().f
    assert all(isinstance(network[i], torch.nn.LeakyReLU) for i in (1, 3, 5, 7))
    assert {network[i].negative_slope for i in (1, 3, 5, 7)} == {0.05}


def test_default_network_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ConvEnergy().parameters()) == 693_569


@pytest.mark.parametrize("activation", ["leaky_relu", "soft_lrelu"])
def test_activation_adds_no_parameters(activation):
    assert ConvEnergy(ConvEnergySettings(activation=activation)).state_dict().keys() == (
        ConvEnergy().state_dict().keys()
    )


@pytest.mark.parametrize("activation", ["leaky_relu", "soft_lrelu"])
@pytest.mark.parametrize(
    ("channels", "size"), [(1, 8), (1, 28), (3, 15), (2, 16), (1, 31), (3, 64)]
)
def test_any_size_and_channel_count_gives_one_number_an_image(channels, size, activation):
    shape = ConvEnergySettings(channels=channels, image_size=size, width=2, activation=activation)
    energy = ConvEnergy(shape)
    assert energy(torch.zeros(3, channels, size, size)).shape == (3,)
    assert energy(torch.zeros(1, channels, size, size)).shape == (1,)
    assert energy(torch.zeros(0, channels, size, size)).shape == (0,)


def test_images_of_a_batch_do_not_mix():
    energy, x = small("soft_lrelu"), torch.rand(4, 1, 8, 8).double()
    torch.testing.assert_close(energy(x), torch.cat([energy(x[i : i + 1]) for i in range(4)]))


def test_images_of_another_size_are_not_silently_accepted():
    with pytest.raises(RuntimeError):
        small()(torch.zeros(2, 1, 16, 16).double())


def test_channels_last_changes_the_layout_and_not_the_energy():
    energy, x = small(), torch.rand(2, 1, 8, 8).double()
    before = energy(x)
    assert channels_last(energy) is energy
    torch.testing.assert_close(energy(x), before)


@pytest.mark.parametrize(
    "bad", [{"activation": "swish"}, {"image_size": 7}, {"channels": 0}, {"width": 0}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        ConvEnergySettings(**bad)


def test_unknown_activation_is_answered_with_the_known_ones():
    with pytest.raises(UsageError, match="leaky_relu, relu, soft_lrelu"):
        ConvEnergySettings(activation="swish")


@quick
@given(
    x=st.floats(-1e3, 1e3),
    slope=st.floats(0.0, 0.9),
    width=st.floats(1e-3, 1.0),
)
def test_soft_leaky_relu_is_its_formula(x, slope, width):
    a = (1 - slope) / 2
    expected = (1 - a) * x + a * math.sqrt(x * x + width * width) - a * width
    found = float(SoftLeakyReLU(slope, width)(doubles(x)))
    assert math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-12)


def test_published_mefa_constants_are_slope_0_02():
    # a = 0.49 in the published code, whose negative slope is 1 - 2a.
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    expected = 0.51 * x + 0.49 * (x * x + 1e-4).sqrt() - 0.49 * 0.01
    torch.testing.assert_close(SoftLeakyReLU(0.02, 0.01)(x), expected)


@pytest.mark.parametrize(("slope", "width"), [(0.05, 0.01), (0.02, 0.3), (0.0, 1.0)])
def test_soft_leaky_relu_has_right_first_and_second_derivatives(slope, width):
    x = torch.linspace(-4, 4, 17, dtype=torch.float64) * width
    x.requires_grad_()
    # eps stays well inside the bend, whose third derivative grows as 1 / width^2.
    options = {"eps": 1e-4 * width, "atol": 1e-6 / width, "rtol": 1e-4}
    assert gradcheck(SoftLeakyReLU(slope, width), x, **options)
    assert gradgradcheck(SoftLeakyReLU(slope, width), x, **options)


def test_soft_leaky_relu_slope_runs_from_the_negative_slope_to_one():
    x = doubles(-1e6, 0.0, 1e6).requires_grad_()
    (slope,) = torch.autograd.grad(SoftLeakyReLU(0.05, 0.01)(x).sum(), x)
    torch.testing.assert_close(slope, doubles(0.05, 0.525, 1.0))


def test_soft_leaky_relu_is_zero_at_zero_and_increases():
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)
    y = SoftLeakyReLU()(x)
    assert abs(float(y[100])) < 1e-15
    assert bool((y.diff() > 0).all())


def test_soft_leaky_relu_without_width_is_leaky_relu():
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    sharp = torch.nn.functional.leaky_relu(x, 0.05)
    torch.testing.assert_close(SoftLeakyReLU(0.05, 1e-9)(x), sharp, rtol=0, atol=1e-9)
    # It lies below by a·e in the positive limit and in the negative one.
    gap = sharp - SoftLeakyReLU(0.05, 0.01)(x)
    assert 0 < float(gap.min()) <= float(gap.max()) <= 0.475 * 0.01


def test_leaky_relu_energy_has_no_curvature():
    x, v = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    _, product = hvp(lambda x: small("leaky_relu")(x).sum(), x, v)
    assert float(product.abs().max()) == 0.0


def test_soft_energy_has_curvature_that_finite_differences_confirm():
    x, v = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    energy = small("soft_lrelu")
    _, product = hvp(lambda x: energy(x).sum(), x, v)

    def slope(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]

    h = 1e-6
    difference = (slope(x + h * v) - slope(x - h * v)) / (2 * h)
    assert float(product.abs().max()) > 1e-4
    torch.testing.assert_close(product, difference, rtol=1e-4, atol=1e-6)


def test_soft_energy_passes_gradcheck_of_both_orders():
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x.requires_grad_()
    assert gradcheck(small("soft_lrelu"), x)
    assert gradgradcheck(small("soft_lrelu"), x, atol=1e-4)


def quadratic(curvature: torch.Tensor) -> QuadraticEnergy:
    return QuadraticEnergy(doubles(0.1, -0.2, 0.3, 0.0).view(1, 2, 2), curvature)


@pytest.mark.parametrize(
    "curvature",
    [doubles(1.0, 2.0, 0.0, 4.0), doubles(*range(16)).view(4, 4) + 1.0],
    ids=["diagonal", "full"],
)
def test_quadratic_energy_has_its_value_and_gradient(curvature):
    full = curvature.diag() if curvature.ndim == 1 else curvature + curvature.T
    energy = quadratic(curvature if curvature.ndim == 1 else full)
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x.requires_grad_()
    d = (x - energy.mean).flatten(1)
    value = torch.stack([0.5 * row @ full @ row for row in d])
    torch.testing.assert_close(energy(x), value)
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    torch.testing.assert_close(gradient.flatten(1), d.detach() @ full)


def test_a_diagonal_is_the_same_as_its_matrix():
    diagonal = doubles(0.5, 1.0, 2.0, 0.0)
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(quadratic(diagonal)(x), quadratic(diagonal.diag())(x))


def test_quadratic_energy_moves_with_its_module():
    energy = quadratic(doubles(1.0, 1.0, 1.0, 1.0)).float()
    assert energy(torch.zeros(2, 1, 2, 2)).dtype == torch.float32
    assert set(energy.state_dict()) == {"mean", "curvature"}
