"""An audit passes an honest defense, and fails one that hides its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.gradients.full import Full
from ebm_defense.attacks.gradients.registry import fitting_gradient
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.audit import AuditSettings, audit, verdicts
from ebm_defense.eval.reporting.audit_page import audit_text, draw_audit
from ebm_defense.purifiers.baselines import GaussianNoise, NoPurifier

SHORT = {"steps": 8, "replicates": 2, "many": 8, "draws": 8, "queries": 30, "tries": 2}


def settings(eps: float = 0.05, **options) -> AuditSettings:
    return AuditSettings(threat=ThreatModel(eps=eps), larger=(2.0, 8.0), **(SHORT | options))


def images_of(count: int = 24) -> tuple[Tensor, Tensor]:
    """Two classes, apart by twice as much as eps of 0.1 moves them."""
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    images = 0.5 + 0.3 * noise
    images[..., :2] += (0.1 * (2 * labels - 1))[:, None, None, None]
    return images.clamp(0, 1), labels


class Halves(nn.Module):
    """Logits by the difference of the halves' means, in steps if it masks its gradient."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        score = self.scale * (x[..., :2].mean((1, 2, 3)) - x[..., 2:].mean((1, 2, 3)))
        if self.masked:  # the right steps, with a slope that says nothing
            stairs = (4 * score.detach()).round() / 4
            score = stairs + 1e-6 * x[..., 0, 0].sum(1) * self.scale
        return torch.stack([-score, score], 1)


def verdict(checks, word: str) -> bool:
    (check,) = (c for c in checks if c.name.startswith(word))
    return check.passed


def test_an_honest_defense_passes(tmp_path):
    images, labels = images_of()
    defense = PurifiedClassifier(Halves(), GaussianNoise(0.02), replicates=4, seed=0)
    gradient = fitting_gradient(defense, images)
    other = PurifiedClassifier(Halves(), NoPurifier(), replicates=1, seed=0)
    found = audit(defense, images, labels, gradient, settings(), other)
    checks = verdicts(found)
    assert [c.name for c in checks if not c.passed] == []
    assert len(checks) == 7
    text = audit_text("mine", checks, found, settings())
    assert text.count("**passed**") == 7
    draw_audit("mine", found, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 1000


def test_a_masked_gradient_fails():
    images, labels = images_of()
    defense = PurifiedClassifier(Halves(masked=True), NoPurifier(), replicates=1, seed=0)
    found = audit(defense, images, labels, Full(), settings(0.15))
    checks = verdicts(found)
    assert not verdict(checks, "Square")
    assert found.transfer is None
    assert not any(c.name.startswith("transfer") for c in checks)


def test_a_gradient_that_noise_drowns_fails_by_frozen_noise_or_eot():
    """With one replicate of huge noise every step goes astray; many replicates find the way."""

    class Drowned(Halves):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.0

    images, labels = images_of()
    noisy = PurifiedClassifier(Drowned(), GaussianNoise(0.02), replicates=4, seed=0)

    class Wrong(Full):
        """Turned about unless many replicates were asked for."""

        def __call__(self, defense, images, labels, keys, loss):
            found = super().__call__(defense, images, labels, keys, loss)
            return found if len(keys) >= 8 else found._replace(gradient=-found.gradient)

    checks = verdicts(audit(noisy, images, labels, Wrong(), settings()))
    assert not verdict(checks, "EOT")


def test_compression_is_that_of_the_chain(langevin_defense):
    """Of chains on an energy, by K; at K = 0 nothing is taken back."""
    defense = langevin_defense(steps=2, classes=2)
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = audit(defense, images, torch.zeros(4).long(), Full(), settings())
    assert [k for k, _, _ in found.compression] == [0, 1, 2]
    assert found.compression[0][1:] == pytest.approx((1.0, 1.0))


def test_numbers_out_of_range_are_refused():
    for wrong in ({"steps": 0}, {"larger": ()}, {"larger": (3.0, 2.0)}, {"larger": (0.5,)}):
        with pytest.raises(UsageError):
            AuditSettings(threat=ThreatModel(eps=0.1), **wrong)


def test_the_command_writes_its_page(tmp_path, tiny_defense):
    from ebm_defense.commands.main import main

    words = ["--images", "6", "--steps", "2", "--many", "2", "--draws", "2", "--queries", "2",
             "--tries", "1", "--data", "digits", "--replicates", "1"]  # fmt: skip
    out = tmp_path / "page"
    status = main(["audit", str(tiny_defense), "--out", str(out), *words])
    assert status in (0, 1)
    text = (out / "audit.md").read_text(encoding="utf-8")
    assert ("FAILED" in text) == (status == 1)
    assert "steps K" in text
