"""The fused step's derivatives are double autograd's, by images and by every weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense.energies import QuadraticEnergy
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, SoftLeakyReLU
from ebm_defense.engine.differentiable import ConvStep, differentiable_gradient
from ebm_defense.engine.smooth import CLOSED, closed_form

ACTIVATIONS = ["silu", "softplus", "soft_lrelu:0.3", "leaky_relu"]
SHAPES = [(1, 8, 2), (2, 9, 3), (3, 15, 2), (1, 28, 2)]


def energy_of(activation="silu", channels=1, size=8, width=2) -> ConvEnergy:
    shape = {"channels": channels, "image_size": size, "width": width}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvEnergy(ConvEnergySettings(**shape, activation=activation)).double()


def images_of(energy: ConvEnergy, seed: int = 1) -> torch.Tensor:
    s = energy.settings
    shape = (3, s.channels, s.image_size, s.image_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def derivatives(gradient, energy, x, weight):
    """The gradient, and what a functional of it has as derivatives by x and by every weight."""
    x = x.clone().requires_grad_()
    value = gradient(x)
    wanted = [x, *energy.parameters()]
    found = torch.autograd.grad((value * weight).sum(), wanted, allow_unused=True)
    return [
        value,
        *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)),
    ]


def by_double_autograd(energy):
    def gradient(x):
        return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]

    return gradient


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_step_has_double_autograds_derivatives(activation, shape):
    energy = energy_of(activation, *shape)
    x, weight = images_of(energy), images_of(energy, seed=2)
    fused = differentiable_gradient(energy)
    assert isinstance(fused, ConvStep)
    ours = derivatives(fused, energy, x, weight)
    theirs = derivatives(by_double_autograd(energy), energy, x, weight)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_bf16_is_near_fp32_and_keeps_the_states_dtype():
    energy = energy_of("silu", 1, 28, 4).float()
    x = images_of(energy).float()
    exact = differentiable_gradient(energy)(x)
    fast = differentiable_gradient(energy, "bf16")(x)
    assert fast.dtype == torch.float32
    assert float((fast - exact).norm() / exact.norm()) < 0.02


def test_another_energy_is_differentiated_by_autograd():
    curvature = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    energy = QuadraticEnergy(torch.zeros(1, 2, 2, dtype=torch.float64), curvature)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    gradient = differentiable_gradient(energy)(x)
    assert torch.equal(gradient.flatten(), curvature)
    (product,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(product.flatten(), curvature)


@pytest.mark.parametrize(
    "layer", [nn.SiLU(), nn.Softplus(beta=2.0), SoftLeakyReLU(0.05, 0.3), nn.LeakyReLU(0.05)]
)
def test_closed_forms_are_the_layers_and_their_derivatives(layer):
    assert type(layer) in CLOSED
    # 0 is LeakyReLU's corner, where autograd and the closed form may choose sides.
    z = torch.linspace(-6, 6, 1202, dtype=torch.float64, requires_grad=True)
    value = layer(z)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    curvature = torch.zeros_like(z)
    if slope.requires_grad and not isinstance(layer, nn.LeakyReLU):
        (curvature,) = torch.autograd.grad(slope.sum(), z)
    jet = closed_form(layer)(z)
    for found, expected in zip(jet, (value, slope, curvature), strict=True):
        torch.testing.assert_close(found, expected.to(found), rtol=1e-9, atol=1e-12)


def test_an_unknown_activation_has_no_closed_form():
    assert closed_form(nn.GELU()) is None
