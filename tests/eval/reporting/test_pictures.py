"""Pictures of a run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from ebm_defense import LangevinPurifier, PurifiedClassifier, QuadraticEnergy
from ebm_defense.eval.reporting.figures.pictures import draw_strip, film_strip, purification_rows
from ebm_defense.purifiers.baselines import NoPurifier


def purifier(steps: int) -> LangevinPurifier:
    energy = QuadraticEnergy(torch.zeros(1, 8, 8), torch.ones(64))
    return LangevinPurifier(energy, steps, 0.1, 1.0)


def test_the_strip_shows_the_start_the_moments_and_the_end() -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    strip = film_strip(purifier(60), images)
    assert [name for name, _ in strip] == ["K = 0", "K = 10", "K = 50", "K = 60"]
    torch.testing.assert_close(strip[0][1], images)
    moved = [(row - images).norm() for _, row in strip]
    assert all(a < b for a, b in pairwise(moved))


def test_rows_without_a_chain_end_in_the_purified_image() -> None:
    defense = PurifiedClassifier(torch.nn.Flatten(), NoPurifier(), replicates=1)
    rows = purification_rows(defense, torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    assert [name for name, _ in rows] == ["original", "adversarial", "purified"]
    assert (rows[2][1] == 1.0).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_a_strip_is_drawn_with_verdicts(tmp_path: Path, channels: int, suffix: str) -> None:
    rows = [("a", torch.rand(3, channels, 8, 8)), ("b", torch.rand(3, channels, 8, 8))]
    path = tmp_path / f"strip.{suffix}"

    def classify(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[: len(x)]

    draw_strip(rows, path, classify, torch.tensor([0, 0, 2]), ("cat", "dog", "hat"), "title")
    assert path.stat().st_size > 1000
    if suffix == "png":
        with Image.open(path) as picture:
            colours = {c for _, c in picture.convert("RGB").getcolors(1 << 24)}
        assert any(g > r + 60 and g > b + 40 for r, g, b in colours)  # right, in green
        assert any(r > g + 60 and r > b + 60 for r, g, b in colours)  # wrong, in red
