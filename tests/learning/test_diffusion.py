"""Learning a denoiser: it reaches the best one where that is known, and goes on exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ebm_defense.commands.main import main
from ebm_defense.data import Images
from ebm_defense.denoisers.base import Denoiser
from ebm_defense.denoisers.read import open_denoiser
from ebm_defense.errors import FailedRunError, UsageError
from ebm_defense.learning.diffusion import DiffusionRecipe, DiffusionTrainer

MEAN, STD = 0.2, 0.4
"""Of the data, in [-1, 1] units."""


@dataclass(frozen=True)
class Shape:
    channels: int = 1
    image_size: int = 4


class Affine(Denoiser):
    """a_t·x + b_t, of which one is the best for Gaussian pixels."""

    alphas = (0.9, 0.5, 0.1)
    settings = Shape()

    def __init__(self):
        super().__init__()
        self.slope, self.shift = (nn.Parameter(torch.zeros(3)) for _ in range(2))

    def forward(self, x, level):
        slope, shift = (p[level].view(-1, 1, 1, 1) for p in (self.slope, self.shift))
        return slope * x + shift


def data(count: int = 2_000) -> Images:
    pixels = MEAN + STD * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Images(((pixels + 1) / 2).clamp(0, 1), torch.zeros(count, dtype=torch.int64))


RECIPE = DiffusionRecipe(updates=600, batch=100, lr=0.05, average=0.9, flip=False)


def test_learning_reaches_the_best_denoiser_of_gaussian_pixels():
    images = data()
    mean = float(2 * images.images.mean() - 1)
    variance = float(4 * images.images.var())
    denoiser = Affine()
    losses = [u.loss for u in DiffusionTrainer(denoiser, images, RECIPE).run()]
    best = []
    for alpha, slope, shift in zip(denoiser.alphas, denoiser.slope, denoiser.shift, strict=True):
        spread = alpha * variance + 1 - alpha
        wanted = math.sqrt(1 - alpha) / spread
        assert slope.item() == pytest.approx(wanted, abs=0.03)
        assert shift.item() == pytest.approx(-wanted * math.sqrt(alpha) * mean, abs=0.03)
        best.append(1 - (1 - alpha) / spread)
    assert sum(losses[-100:]) / 100 == pytest.approx(sum(best) / 3, rel=0.03)


def test_a_checkpoint_goes_on_exactly(tmp_path):
    recipe = DiffusionRecipe(updates=8, batch=10, lr=0.05, average=0.5)
    whole = DiffusionTrainer(Affine(), data(40), recipe)
    list(whole.run())
    first = DiffusionTrainer(Affine(), data(40), recipe)
    for update in first.run():
        if update.number == 5:
            first.save(tmp_path / "checkpoint.pt")
            break
    second = DiffusionTrainer(Affine(), data(40), recipe)
    second.load(tmp_path / "checkpoint.pt")
    list(second.run())
    assert second.history == whole.history
    for ours, theirs in ((second.denoiser, whole.denoiser), (second.averaged, whole.averaged)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    DiffusionTrainer(Affine(), data(40), DiffusionRecipe(batch=10)).save(tmp_path / "c.pt")
    other = DiffusionTrainer(Affine(), data(40), DiffusionRecipe(batch=10, seed=1))
    with pytest.raises(UsageError, match="begun with seed 0"):
        other.load(tmp_path / "c.pt")
    torch.save({"history": 1}, tmp_path / "d.pt")
    with pytest.raises(UsageError, match="no checkpoint of this network"):
        other.load(tmp_path / "d.pt")


def test_a_loss_that_is_no_number_stops_before_the_weights_change():
    denoiser = Affine()
    with torch.no_grad():
        denoiser.slope.fill_(math.inf)
    with pytest.raises(FailedRunError, match="diverged at update 1"):
        list(DiffusionTrainer(denoiser, data(40), DiffusionRecipe(batch=10)).run())


@pytest.mark.parametrize("bad", [{"updates": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"average": 1.0}])
def test_bad_recipes_are_refused(bad):
    with pytest.raises(UsageError, match="must"):
        DiffusionRecipe(**bad)


SMALL = [
    "--images", "60", "--batch", "8", "--widths", "8", "8", "--data", "digits",
    "--checkpoint-every", "1", "--pictures-every", "9", "--levels", "20", "--patch", "2",
]  # fmt: skip


def run(out, *more):
    return main(["train-diffusion", "--out", str(out), *SMALL, *more])


def test_the_command_learns_resumes_and_leaves_a_model_that_purifies(tmp_path, capsys):
    assert run(tmp_path / "dry", "--dry-run") == 0
    assert "parameters; 10,000 updates of 8 images take" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    assert run(tmp_path / "out", "--updates", "1") == 0
    assert run(tmp_path / "out", "--updates", "2") == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert run(tmp_path / "out", "--updates", "2", "--resume") == 0
    assert (tmp_path / "out" / "history.csv").read_text().count("\n") == 3
    assert run(tmp_path / "out", "--updates", "2", "--resume", "--seed", "1") == 2
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 4
    assert open_denoiser(tmp_path / "out").levels == 20


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--patch", "3"), "a multiple of 6 pixels"),
        (("--widths", "12"), "multiples of 8"),
        (("--schedule", "sigmoid"), "noise schedule is 'sigmoid'"),
        (("--pictures-every", "0"), "must be at least 1"),
    ],
)
def test_the_command_refuses_what_cannot_be_learned(more, words, tmp_path, capsys):
    assert run(tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
