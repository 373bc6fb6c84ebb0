"""Residual and class-conditional energies have the published shapes and say what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import UsageError
from ebm_defense.energies.classes import LogSumExpEnergy
from ebm_defense.energies.residual import ResidualEnergy, ResidualEnergySettings
from ebm_defense.engine import energy_and_gradient


def test_the_default_has_the_published_number_of_parameters() -> None:
    energy = ResidualEnergy()
    assert sum(p.numel() for p in energy.parameters()) == 4_204_800


def test_width_128_has_the_keys_and_shapes_of_puregen() -> None:
    state = ResidualEnergy(ResidualEnergySettings(width=128)).state_dict()
    names = {f"block{i}.{c}" for i in (1, 2) for c in ("c1", "c2", "c_sc")}
    names |= {f"block{i}.{c}" for i in (3, 4) for c in ("c1", "c2")}
    assert set(state) == {f"{n}.{p}" for n in names for p in ("weight", "bias")} | {"l5.weight"}
    assert state["l5.weight"].shape == (1, 128)
    assert state["block1.c_sc.weight"].shape == (128, 3, 1, 1)


@pytest.mark.parametrize(("size", "halvings"), [(28, 2), (64, 3), (96, 4)])
def test_it_takes_images_of_many_sizes(size: int, halvings: int) -> None:
    settings = ResidualEnergySettings(channels=1, image_size=size, width=4, halvings=halvings)
    x = torch.rand(2, 1, size, size) * 2 - 1
    value, gradient = energy_and_gradient(ResidualEnergy(settings), x)
    assert value.shape == (2,)
    assert gradient.shape == x.shape
    assert float(gradient.abs().max()) > 0


def test_its_first_block_is_what_the_paper_draws() -> None:
    """A stem by hand: 1×1 convolutions as sums, so that every term can be seen."""
    energy = ResidualEnergy(ResidualEnergySettings(channels=1, image_size=16, width=1, level=0))
    for p in energy.parameters():
        nn.init.zeros_(p)
    stem = energy.block1
    stem.c1.weight.data[0, 0, 1, 1] = 1.0
    stem.c2.weight.data[0, 0, 1, 1] = 2.0
    stem.c_sc.weight.data[:] = 10.0
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    # The activation cuts what is negative on the main way, and the shortcut passes it.
    assert stem(x)[:, 0, 0, 0].tolist() == [-10.0, 12.0]


def test_its_shape_is_read_off_its_weights() -> None:
    settings = ResidualEnergySettings(channels=1, image_size=64, width=6, halvings=3, level=1)
    state = ResidualEnergy(settings).state_dict()
    assert ResidualEnergySettings.of(state, "it", 64) == settings
    del state["l5.weight"]
    with pytest.raises(UsageError, match=r"it lacks .* no weights of a residual energy"):
        ResidualEnergySettings.of(state, "it", 64)


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"halvings": 1}, {"halvings": 4}, {"activation": "gelu"}]
)
def test_a_shape_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ResidualEnergySettings(**wrong)  # type: ignore[arg-type]


def test_a_classifier_is_an_energy() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = classifier((x + 1) / 2)
    energy = LogSumExpEnergy(classifier, unit=True)
    torch.testing.assert_close(energy(x), -logits.exp().sum(1).log())
    torch.testing.assert_close(energy.of_class(2)(x), -logits[:, 2])
    # Langevin on −log p(y|x) plus the energy is Langevin on the class's own energy.
    torch.testing.assert_close(energy(x) - logits.log_softmax(1)[:, 1], energy.of_class(1)(x))


def test_classes_that_are_not_there_are_refused() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(UsageError, match="0 to 2"):
        LogSumExpEnergy(classifier, classes=(3,))(torch.zeros(1, 1, 2, 2))
    with pytest.raises(UsageError, match="at least one"):
        LogSumExpEnergy(classifier, classes=())
    with pytest.raises(UsageError, match=r"\[N, classes\]"):
        LogSumExpEnergy(nn.Identity())(torch.zeros(1, 1, 2, 2))
